"""One file with its own text encoder and VAE is the folder it was made of; faults are named."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import original_names as original
import pytest
import torch
from safetensors.torch import save_file

from tiue_export import load_student
from tiue_export.checkpoint.clip_tokenizer import OPENAI_PAD, OPENCLIP_PAD, write_clip_tokenizer
from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.single_file import file_parts
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import CheckpointError, TiueError, UnsupportedModelError, UsageError
from tiue_export.student import load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "whole.safetensors"


@pytest.fixture
def tokenizer_alone(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A base that has nothing but a tokenizer."""
    shutil.copytree(tiny_pipeline / "tokenizer", tmp_path / "base" / "tokenizer")
    return tmp_path / "base"


@torch.no_grad()
def outputs(student) -> tuple[torch.Tensor, ...]:
    """What each part makes of the same input."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(77)[None]
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    text = student.text_encoder(ids).last_hidden_state
    return text, student.sample(noise, text), student.vae.decode(noise).sample


def assert_same(a, b) -> None:
    for part in ("unet", "text_encoder", "vae"):
        left, right = (getattr(student, part).state_dict() for student in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    # Weights that lie otherwise in memory are summed in another order.
    torch.testing.assert_close(outputs(a), outputs(b), rtol=0, atol=1e-4)


def refused(kind: type[TiueError], path: Path, *parts: str, **options: object) -> str:
    with pytest.raises(kind) as caught:
        load_student(path, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


# --- its own parts


@pytest.mark.parametrize("form", ["clip", "open_clip"])
@pytest.mark.parametrize("place", ["cond_stage_model.", "conditioner.embedders.0."])
def test_a_files_own_text_encoder_and_vae_are_used(
    form, place, tiny_pipeline, tiny_student, tokenizer_alone, file
):
    tensors = original.write_whole_file(tiny_pipeline, file, form=form)
    save_file({n.replace("cond_stage_model.", place): t for n, t in tensors.items()}, file)
    student = load_student(file, tokenizer_alone)
    assert_same(student, tiny_student)
    assert student.source.parts == {
        "text_encoder": "checkpoint",
        "vae": "checkpoint",
        "tokenizer": "base base",
        "scheduler": "none",
    }
    assert set(student.source.part_sha256.values()) == {student.source.sha256}
    assert not any("were left" in note for note in student.source.notes)


def test_base_overrides_no_part_of_the_file(tiny_pipeline, tiny_student, micro_pipeline, file):
    original.write_whole_file(tiny_pipeline, file)
    student = load_student(file, micro_pipeline)  # has another text encoder and VAE
    assert_same(student, tiny_student)
    assert student.source.parts["scheduler"] == "base pipeline"


def test_base_gives_the_part_that_the_file_lacks(tiny_pipeline, micro_pipeline, file):
    tensors = original.write_whole_file(tiny_pipeline, file)
    save_file({n: t for n, t in tensors.items() if not n.startswith(original.VAE)}, file)
    student = load_student(file, micro_pipeline)
    assert type(student.vae).__name__ == "AutoencoderTiny"
    assert student.source.parts["vae"] == "base pipeline"
    assert student.source.parts["text_encoder"] == "checkpoint"
    assert load_student(file).vae is None


def test_a_text_encoder_of_another_vocabulary_needs_the_tokenizer_of_a_base(tiny_pipeline, file):
    original.write_whole_file(tiny_pipeline, file)
    student = load_student(file)
    assert student.text_encoder is None
    assert student.source.parts["text_encoder"] == "none"
    assert "no tokenizer came with it; --base gives one" in " ".join(student.source.notes)


def test_parts_that_are_not_wanted_are_not_loaded(tiny_pipeline, tokenizer_alone, file):
    original.write_whole_file(tiny_pipeline, file)
    student = load_student(file, tokenizer_alone, without=("vae", "text_encoder"))
    assert student.vae is None
    assert student.text_encoder is None
    assert student.source.part_sha256 == {}


# --- CLIP's tokenizer


@pytest.mark.parametrize(
    ("form", "pad"), [("clip", OPENAI_PAD), ("open_clip", OPENCLIP_PAD)], ids=["sd1", "sd2"]
)
def test_clips_own_tokenizer_comes_along_with_the_padding_of_the_family(form, pad, tmp_path):
    tensors = {"cond_stage_model.transformer.a": torch.zeros(1)}
    if form == "open_clip":
        tensors = {"conditioner.embedders.0.model.a": torch.zeros(1)}
    own = file_parts(tmp_path, tensors)
    write_clip_tokenizer(tmp_path, own.pad_token)
    ids = tokenizer_of(tmp_path, 77)(["a photo of a cat"])
    # As CLIP's own code has them: https://github.com/openai/CLIP, tokenize("a photo of a cat").
    end, padding = 49407, {OPENAI_PAD: 49407, OPENCLIP_PAD: 0}[pad]
    assert ids.tolist() == [[49406, 320, 1125, 539, 320, 2368, end, *[padding] * 70]]


def test_a_file_whose_vocabulary_is_clips_draws_without_a_base(tiny_pipeline, file, monkeypatch):
    text = {**load_family("tiny").text_encoder, "vocab_size": 49408}
    family = dataclasses.replace(load_family("tiny"), text_encoder=text)
    monkeypatch.setattr("tiue_export.checkpoint.single_file.load_family", lambda name: family)
    tensors = original.write_whole_file(tiny_pipeline, file)
    table = original.CLIP + "embeddings.token_embedding.weight"
    save_file({**tensors, table: torch.zeros(49408, 32)}, file)
    student = load_student(file)
    assert student.source.parts["tokenizer"] == "CLIP's own"
    assert np.array_equal(tokenizer_of(student.tokenizer_folder, 77)(["cat"])[0, 1:2], [2368])


# --- what does not fit


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("first_stage_model.decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q"),
        ("first_stage_model.encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets"),
        ("cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.bias", "layers.1.mlp.fc1.bias"),
        ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight", "0.self_attn.q"),
    ],
)
def test_a_missing_tensor_of_a_part_is_named(name, said, tiny_pipeline, tokenizer_alone, file):
    tensors = original.write_whole_file(tiny_pipeline, file, form="open_clip")
    del tensors[name]
    save_file(tensors, file)
    refused(CheckpointError, file, "missing: ", said, base=tokenizer_alone)


@pytest.mark.parametrize(
    "name",
    [
        "first_stage_model.decoder.surprise.weight",
        "first_stage_model.encoder.down.0.block.9.conv1.weight",
        "cond_stage_model.transformer.text_model.surprise",
        "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.bias",
    ],
)
def test_an_unknown_tensor_of_a_part_is_named(name, tiny_pipeline, tokenizer_alone, file):
    original.write_whole_file(tiny_pipeline, file, **{name: torch.zeros(1)})
    refused(CheckpointError, file, "1 unexpected: ", name.split(".")[-1], base=tokenizer_alone)


@pytest.mark.parametrize("name", ["surprise", "transformer.surprise"])
def test_an_unknown_tensor_of_an_open_clip_is_named(name, tiny_pipeline, tokenizer_alone, file):
    extra = {original.OPEN_CLIP + name: torch.zeros(1)}
    original.write_whole_file(tiny_pipeline, file, form="open_clip", **extra)
    refused(CheckpointError, file, "1 unexpected: ", "surprise", base=tokenizer_alone)


@pytest.mark.parametrize("form", ["clip", "open_clip"])
@pytest.mark.parametrize("sound", [(), ("token_embedding.weight", "conv_in.weight")])
def test_tensors_of_no_sense_are_refused_in_words(
    form, sound, tiny_pipeline, tokenizer_alone, file
):
    tensors = original.write_whole_file(tiny_pipeline, file, form=form)
    parts = ("cond_stage_model", original.VAE)
    broken = {
        name: torch.zeros(()) if name.startswith(parts) and not name.endswith(sound) else tensor
        for name, tensor in tensors.items()
    }
    save_file(broken, file)
    for part, what in (("vae", "the text encoder in "), ("text_encoder", "the VAE in ")):
        refused(TiueError, file, what, base=tokenizer_alone, without=(part,))


def test_a_text_encoder_of_no_known_size_is_refused_with_the_known_ones(tiny_pipeline, file):
    tensors = original.write_whole_file(tiny_pipeline, file)
    tensors[original.CLIP + "embeddings.token_embedding.weight"] = torch.zeros(7, 32)
    save_file(tensors, file)
    refused(UnsupportedModelError, file, "table of tokens (7, 32)", "(49408, 768)")


def test_what_is_of_no_part_is_told(tiny_pipeline, file):
    original.write_whole_file(tiny_pipeline, file, alphas_cumprod=torch.zeros(3))
    notes = load_student(file).source.notes
    assert "1 tensors of no part were left, such as 'alphas_cumprod'" in notes


# --- --vae FILE


@pytest.fixture
def vae_tensors(tiny_pipeline):
    return original.part(tiny_pipeline, "vae")


def old_attention(tensors):
    """As diffusers named a VAE's attention before 0.15; sd-vae-ft-mse is still so."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {n.replace(f".{new}.", f".{name}."): t for n, t in tensors.items()}
    return tensors


@pytest.mark.parametrize("names", ["diffusers", "old diffusers", "original", "whole checkpoint"])
def test_a_vae_is_taken_from_one_file_whatever_its_names(
    names, tiny_pipeline, micro_pipeline, vae_tensors, tiny_student, file
):
    tensors = {
        "diffusers": lambda: vae_tensors,
        "old diffusers": lambda: old_attention(vae_tensors),
        "original": lambda: original.vae_names(vae_tensors),
        "whole checkpoint": lambda: original.write_whole_file(tiny_pipeline, file),
    }[names]()
    original.save(tensors, file)
    student = load_student(micro_pipeline, vae=file)
    noise = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(student.vae.decode(noise).sample, tiny_student.vae.decode(noise).sample)
    assert student.source.parts["vae"] == "--vae whole.safetensors"


def test_a_tiny_autoencoder_is_taken_from_one_file_too(tiny_pipeline, micro_pipeline, file):
    shutil.copy(micro_pipeline / "vae" / "config.json", file.parent)
    shutil.copy(micro_pipeline / "vae" / "diffusion_pytorch_model.safetensors", file)
    student = load_student(tiny_pipeline, vae=f"tiny:{file}")
    own, given = load_student(micro_pipeline).vae, student.vae
    noise = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(own.decode(noise).sample, given.decode(noise).sample)


def test_a_file_that_is_no_vae_is_refused(tiny_pipeline, vae_tensors, file):
    unet = next((tiny_pipeline / "unet").glob("*.safetensors"))
    refused(UnsupportedModelError, tiny_pipeline, "holds no VAE: it holds", vae=unet)


def test_the_vae_of_sdxl_is_refused_where_it_says_so(tiny_pipeline, vae_tensors, file):
    said = {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}
    original.save(original.vae_names(vae_tensors), file, said)
    refused(UnsupportedModelError, tiny_pipeline, "is the VAE of another family", vae=file)


def test_a_vae_file_that_lacks_tensors_or_halves_is_refused(tiny_pipeline, vae_tensors, file):
    named = original.vae_names(vae_tensors)
    original.save({n: t for n, t in named.items() if "up.1" not in n}, file)
    refused(CheckpointError, tiny_pipeline, "the VAE in ", "missing: decoder.up_", vae=file)
    original.save({n: t for n, t in named.items() if n.startswith("decoder.")}, file)
    refused(UnsupportedModelError, tiny_pipeline, "is of no known size", vae=file)


def test_tiny_insists_on_the_vae_of_a_file_too(tiny_pipeline, vae_tensors, file):
    original.save(vae_tensors, file)
    refused(UnsupportedModelError, tiny_pipeline, "holds a AutoencoderKL", vae=f"tiny:{file}")


def test_a_pickled_vae_is_refused_with_the_line_that_converts_it(tiny_pipeline, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "vae.ckpt")
    message = refused(CheckpointError, tiny_pipeline, "is a pickle", vae=tmp_path / "vae.ckpt")
    assert message.endswith("vae.safetensors")


# --- what the network predicts


def unet_file(pipeline: Path, file: Path, metadata=None, **extra) -> Path:
    return original.save(original.part(pipeline, "unet") | extra, file, metadata)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_of_a_single_file_can_be_said(prediction, tiny_pipeline, file):
    student = load_student(unet_file(tiny_pipeline, file), prediction=prediction)
    assert student.plan.prediction_type == prediction
    assert student.scheduler_config["prediction_type"] == prediction


@pytest.mark.parametrize("ldm", [False, True])
def test_a_key_v_pred_says_it_by_itself(ldm, tiny_pipeline, file):
    key = {"v_pred": torch.zeros(0)}
    if ldm:
        original.write_whole_file(tiny_pipeline, file, **key)
    else:
        unet_file(tiny_pipeline, file, **key)
    student = load_student(file, tiny_pipeline)
    assert student.plan.prediction_type == "v_prediction"
    assert not any("were left" in note for note in student.source.notes)


@pytest.mark.parametrize(("said", "meant"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_a_files_metadata_says_it_by_itself(said, meant, tiny_pipeline, file):
    unet_file(tiny_pipeline, file, {"modelspec.prediction_type": said})
    assert load_student(file).plan.prediction_type == meant


def test_zero_terminal_snr_is_read_from_its_key(tiny_pipeline, file):
    unet_file(tiny_pipeline, file, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    assert load_student(file).scheduler_config["rescale_betas_zero_snr"]


def test_another_prediction_than_the_checkpoint_says_is_refused(tiny_pipeline, file):
    unet_file(tiny_pipeline, file, {"modelspec.prediction_type": "v"})
    refused(
        UsageError,
        file,
        "--prediction is epsilon, but",
        "says that the network predicts v_prediction",
        prediction="epsilon",
    )
    refused(UsageError, tiny_pipeline, "scheduler_config.json says", prediction="sample")


def test_unknown_predictions_are_refused_by_name(tiny_pipeline, file):
    refused(UsageError, tiny_pipeline, "unknown prediction 'v'; there are", prediction="v")
    unet_file(tiny_pipeline, file, {"modelspec.prediction_type": "flow"})
    refused(CheckpointError, file, "its network predicts 'flow'")


def test_the_prediction_decides_between_families_of_equal_weights():
    families = ("sd21-base", "sd21-v")
    assert load._by_prediction(families, None, "v_prediction") == "sd21-v"
    assert load._by_prediction(families, None, "epsilon") == "sd21-base"
    assert load._by_prediction(families, None, "sample") == "sd21-base"


# --- from the command line


def test_the_options_of_the_loader_are_taken_and_refused_by_the_commands(
    run, tiny_pipeline, vae_tensors, file
):
    unet_file(tiny_pipeline, file)
    original.save(original.vae_names(vae_tensors), file.with_name("vae.safetensors"))
    save_file({"<cat-toy>": torch.zeros(2, 32)}, file.with_name("cat.safetensors"))
    line = ("onnx", "--ckpt", file, "--base", tiny_pipeline, "--dry-run", "--out", "b")
    vae = ("--vae", file.with_name("vae.safetensors"))
    word = ("--embedding", f"{file.with_name('cat.safetensors')}:<my-cat>")
    code, _, err = run(*line, *vae, *word, "--prediction", "v_prediction")
    assert code == 0, err
    assert run(*line, "--prediction", "v")[0] == 2
    assert run(*line, "--vae", "nowhere.safetensors")[0] == 3
    assert run(*line, "--embedding", "nowhere.safetensors")[0] == 3
