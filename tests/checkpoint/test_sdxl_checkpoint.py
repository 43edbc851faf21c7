"""SDXL from pipeline folders, single files and adapters; what does not fit is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import original_names as original
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sdxl_models import sdxl_unet, with_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiue_export import load_student
from tiue_export.benchmarks.synthetic import SMALL_SDXL_SHAPES
from tiue_export.checkpoint import single_file
from tiue_export.checkpoint.family import families_of, family_names, load_family
from tiue_export.checkpoint.ldm_names import ldm_names
from tiue_export.checkpoint.tensors import ldm_signature_shapes
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import CheckpointError, UnsupportedModelError
from tiue_export.student.embedding import add_embedding
from tiue_export.student.lora import merge_lora
from tiue_export.student.pipeline_folder import write_pipeline


def loaded(path, base=None, **options):
    return load_student(path, base, recipe="lightning", **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "whole.safetensors"


@pytest.fixture
def copy(sdxl_folder, tmp_path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(sdxl_folder, tmp_path / "copy"))


def assert_same_weights(a, b) -> None:
    for part in ("unet", "text_encoder", "vae"):
        left, right = (getattr(student, part).state_dict() for student in (a, b))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


# --- families


@pytest.mark.parametrize("family", ["sdxl", "ssd-1b", "vega"])
def test_weights_tell_its_family_by_the_layers_of_its_attentions(family):
    config = load_family(family).unet
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(config).state_dict()
    assert families_of(ldm_signature_shapes(state)) == (family,)
    named = {ldm: state[name] for ldm, name in ldm_names(list(state), config).items()}
    assert len(named) == len(state)
    assert families_of(ldm_signature_shapes(named)) == (family,)


def test_its_families_have_two_text_encoders_and_others_one():
    paired = {name for name in family_names() if load_family(name).text_encoder_2 is not None}
    assert paired == {"sdxl", "ssd-1b", "vega", "tiny-sdxl"}
    assert load_family("vega").vae["scaling_factor"] == 0.13025


# --- one file


def test_a_files_own_text_encoders_and_vae_are_used(sdxl_folder, tmp_path, file):
    original.write_whole_file(sdxl_folder, file, form="sdxl")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(sdxl_folder / name, tmp_path / "base" / name)
    student = loaded(file, tmp_path / "base")
    assert_same_weights(student, loaded(sdxl_folder))
    assert student.source.family == "tiny-sdxl"
    assert student.vae.config.scaling_factor == 0.13025
    assert student.source.parts["text_encoder_2"] == "checkpoint"
    assert not any("were left" in note for note in student.source.notes)


def test_a_file_of_clips_own_vocabulary_needs_no_base(sdxl_folder, tmp_path, file, monkeypatch):
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "clip"))
    vocabulary = {"vocab_size": 49_408, "bos_token_id": 49_406, "eos_token_id": 49_407}
    tiny = load_family("tiny-sdxl")
    first, second = tiny.text_encoder | vocabulary, tiny.text_encoder_2 | vocabulary
    for name, kind, config in (
        ("text_encoder", CLIPTextModel, first),
        ("text_encoder_2", CLIPTextModelWithProjection, second),
    ):
        shutil.rmtree(folder / name)
        kind(CLIPTextConfig(**config)).save_pretrained(folder / name)
    original.write_whole_file(folder, file, form="sdxl")
    with pytest.raises(UnsupportedModelError, match="of no known size"):
        loaded(file)  # as wide as no model that is known

    def family(name: str):
        own = load_family(name)
        return replace(own, text_encoder=first, text_encoder_2=second) if name == tiny.name else own

    monkeypatch.setattr(single_file, "load_family", family)
    student = loaded(file)
    assert student.source.parts["tokenizer"] == student.source.parts["tokenizer_2"] == "CLIP's own"
    assert (student.text_encoder.end_token, student.text_encoder.second_pad) == (49_407, 0)
    for part in ("first", "second"):
        ours = getattr(student.text_encoder, part).state_dict()
        saved = original.part(folder, "text_encoder" if part == "first" else "text_encoder_2")
        assert all(torch.equal(ours[name], tensor) for name, tensor in saved.items())


def test_a_second_encoder_without_its_projection_is_named(sdxl_folder, file):
    tensors = original.write_whole_file(sdxl_folder, file, form="sdxl")
    del tensors["conditioner.embedders.1.model.text_projection"]
    original.save(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing: text_projection\.weight") as caught:
        loaded(file)
    assert "the second text encoder in" in caught.value.message


# --- folders


@pytest.mark.parametrize("shape", SMALL_SDXL_SHAPES)
def test_every_shape_loads_from_a_folder(sdxl_folder, tmp_path, shape):
    folder = with_unet(sdxl_folder, tmp_path / shape, sdxl_unet(shape))
    student = loaded(folder)
    assert student.source.family == ("tiny-sdxl" if shape == "sdxl" else "custom")
    assert student.text_encoder.config.hidden_size == 80


def test_a_unet_folder_takes_the_other_parts_from_its_base(sdxl_folder):
    student = loaded(sdxl_folder / "unet", sdxl_folder)
    assert_same_weights(student, loaded(sdxl_folder))
    assert student.source.parts["tokenizer_2"] == "base tiny-sdxl"


def test_what_is_written_is_a_pipeline_of_sdxl_again(sdxl_folder, tmp_path):
    student = loaded(sdxl_folder)
    folder = write_pipeline(
        tmp_path / "written",
        unet=student.unet,
        text_encoder=student.text_encoder,
        vae=student.vae,
        tokenizer=student.tokenizer_folder,
        scheduler_config=student.scheduler_config,
        dtype=torch.float32,
    )
    again = loaded(folder)
    assert_same_weights(again, student)
    assert again.text_encoder.second_pad == student.text_encoder.second_pad
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    assert pipe.tokenizer_2.pad_token_id == student.text_encoder.second_pad
    assert pipe.config.force_zeros_for_empty_prompt


def test_one_text_encoder_is_not_enough(copy):
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(UnsupportedModelError, match="is 32 wide; the student expects 80 of two"):
        loaded(copy)


def test_tokenizers_that_differ_in_more_than_their_padding_are_refused(copy):
    place = copy / "tokenizer_2" / "merges.txt"
    lines = place.read_text("utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    place.write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(UnsupportedModelError, match="give other tokens for the same words"):
        loaded(copy)


def test_an_inpainting_model_is_refused_by_name(sdxl_folder, tmp_path):
    folder = with_unet(sdxl_folder, tmp_path / "inpainting", sdxl_unet(in_channels=9))
    with pytest.raises(UnsupportedModelError, match="9 input channels, as inpainting has"):
        loaded(folder)


def test_a_refiner_is_refused_by_name(sdxl_folder, tmp_path):
    five = {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 48 + 5 * 8}
    folder = with_unet(sdxl_folder, tmp_path / "refiner", sdxl_unet(**five))
    with pytest.raises(UnsupportedModelError, match="it is an SDXL refiner") as caught:
        loaded(folder)
    assert "Give the base model" in str(caught.value.next_step)


def test_the_vae_of_stable_diffusion_1_is_refused_where_it_says_so(sdxl_folder, file):
    tensors = original.vae_names(original.part(sdxl_folder, "vae"))
    original.save(tensors, file, {"modelspec.architecture": "stable-diffusion-v1/vae"})
    with pytest.raises(UnsupportedModelError, match="is the VAE of another family"):
        loaded(sdxl_folder, vae=file)


def test_a_vae_of_its_own_in_original_names_has_sdxls_scaling_factor(sdxl_folder, file):
    tensors = original.vae_names(original.part(sdxl_folder, "vae"))
    original.save(tensors, file, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"})
    assert loaded(sdxl_folder, vae=file).vae.config.scaling_factor == 0.13025


# --- adapters and learned words


@pytest.fixture(scope="module")
def lora(sdxl_folder, tmp_path_factory) -> Path:
    """A LoRA of UNet and both text encoders as diffusers saves it, and what it fuses into."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    folder = tmp_path_factory.mktemp("lora")
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    torch.manual_seed(0)
    layers = {}
    text = ["q_proj", "fc1"]
    targets = {"unet": ["to_k", "conv1", "proj_in"], "text_encoder": text, "text_encoder_2": text}
    for part, names in targets.items():
        model = getattr(pipe, part)
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=names))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        layers[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(model)
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.load_lora_weights(folder / "pytorch_lora_weights.safetensors")
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    for part in targets:
        state = {k: v.contiguous() for k, v in getattr(pipe, part).state_dict().items()}
        save_file(state, folder / f"{part}.fused")
    return folder


def kohya(file: Path, out: Path) -> Path:
    """The same adapters in kohya's names."""
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for name, tensor in load_file(file).items():
        part, module = name.split(".", 1)
        module = module.replace(".lora_A.weight", "/lora_down.weight")
        module = module.replace(".lora_B.weight", "/lora_up.weight")
        module = module.replace(".lora.down.weight", "/lora_down.weight")
        module = module.replace(".lora.up.weight", "/lora_up.weight")
        module = module.replace(".lora_linear_layer.down.weight", "/lora_down.weight")
        module = module.replace(".lora_linear_layer.up.weight", "/lora_up.weight")
        layer, side = module.split("/")
        tensors[f"{starts[part]}_{layer.replace('.', '_')}.{side}"] = tensor.contiguous()
    save_file(tensors, out)
    return out


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_a_lora_is_merged_as_diffusers_fuses_it(sdxl_folder, lora, spelling, tmp_path):
    file = lora / "pytorch_lora_weights.safetensors"
    if spelling == "kohya":
        file = kohya(file, tmp_path / "kohya.safetensors")
    student = merge_lora(loaded(sdxl_folder), file, 0.7)
    encoder = student.text_encoder
    for part, model in (
        ("unet", student.unet),
        ("text_encoder", encoder.first),
        ("text_encoder_2", encoder.second),
    ):
        expected, found = load_file(lora / f"{part}.fused"), model.state_dict()
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_lora_of_sdxl_is_refused_by_a_model_of_one_text_encoder(lora, tiny_pipeline):
    with pytest.raises(UnsupportedModelError, match="is a LoRA of SDXL, which has two text"):
        merge_lora(load_student(tiny_pipeline), lora / "pytorch_lora_weights.safetensors")


def test_learned_words_go_into_both_tables(sdxl_folder, tmp_path):
    file, vectors = tmp_path / "fox.safetensors", torch.randn(2, 80)
    save_file(
        {"clip_l": vectors[:, :32].contiguous(), "clip_g": vectors[:, 32:].contiguous()}, file
    )
    student = add_embedding(loaded(sdxl_folder), file)
    encoder = student.text_encoder
    for model, own in ((encoder.first, vectors[:, :32]), (encoder.second, vectors[:, 32:])):
        table = model.get_input_embeddings()
        assert torch.equal(table.weight[-2:], own)
    assert len(tokenizer_of(student.tokenizer_folder, 77).words("fox")) == 2
    one = tmp_path / "one.safetensors"
    save_file({"emb_params": vectors[:, :32].contiguous()}, one)
    with pytest.raises(UnsupportedModelError, match="32 wide, this text encoder's 32 and 48"):
        add_embedding(loaded(sdxl_folder), one)
