"""Learned words mean what they mean in diffusers; files that hold none are named."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from safetensors.torch import save_file

from tiue_export import load_student
from tiue_export.checkpoint.demo_student import demo_student
from tiue_export.checkpoint.embedding_file import embedding_from
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import CheckpointError, TiueError, UnsupportedModelError, UsageError
from tiue_export.export.own_student import as_exported
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.student.embedding import add_embedding, embedding_options

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
PROMPTS = [
    "a photo of <cat-toy> in the snow",
    "a <CAT-TOY>, two foxes and <cat-toy>",
    "mystyle fox, <cat-toy>",
    "a red fox",
]


@pytest.fixture
def words(tmp_path: Path) -> tuple[Path, Path]:
    """A file of diffusers with three vectors, and one of A1111 with one, named by its file."""
    diffusers, a1111 = tmp_path / "learned_embeds.safetensors", tmp_path / "MyStyle.safetensors"
    save_file({"<cat-toy>": VECTORS}, diffusers)
    save_file({"emb_params": VECTORS[:1] + 1}, a1111)
    return diffusers, a1111


def text_of(student, prompts: list[str]) -> torch.Tensor:
    ids = torch.from_numpy(tokenizer_of(student.tokenizer_folder, 77)(prompts))
    with torch.no_grad():
        return student.text_encoder(ids).last_hidden_state


def test_learned_words_mean_what_they_mean_in_diffusers(tmp_path):
    # diffusers asks for a vocabulary without holes, which the tiny one has not.
    theirs = StableDiffusionPipeline.from_pretrained(demo_student(), dtype=torch.float32)
    vectors = torch.randn(3, theirs.text_encoder.config.hidden_size).half().float()
    save_file({"<cat-toy>": vectors}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors[:1] + 1}, tmp_path / "MyStyle.safetensors")
    theirs.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    theirs.load_textual_inversion({"MyStyle": (vectors[:1] + 1).half().float()})
    files = tuple(str(tmp_path / f"{name}.safetensors") for name in ("learned_embeds", "MyStyle"))
    ours = load_for_method(CheckpointRequest("demo", embedding=files), None, SamplingOptions())
    ours.text_encoder.float()
    # diffusers writes a word's vectors out only where its letters are of the same case.
    expected, _ = theirs.encode_prompt([p.lower() for p in PROMPTS], "cpu", 1, False)
    torch.testing.assert_close(text_of(ours, PROMPTS), expected)
    tokenizer = tokenizer_of(ours.tokenizer_folder, 77)
    assert len(words := tokenizer.words("<cat-toy>")) == 3
    (long,) = replace(tokenizer, length=154, chunks=2)(["," + " ," * 73 + " <cat-toy>"])
    assert long[[75, 78, 79]].tolist() == words  # over the end of the first chunk


def test_the_source_says_which_words_were_added_and_how_to_type_it(tiny_pipeline, words):
    plain, student = load_student(tiny_pipeline), load_student(tiny_pipeline)
    add_embedding(student, words[0], "my-cat")
    add_embedding(student, words[1])
    assert student.source.notes == (
        "embedding learned_embeds.safetensors added as my-cat, 3 vectors",
        "embedding MyStyle.safetensors added as MyStyle, 1 vector",
    )
    assert embedding_options(student.source) == (
        "--embedding learned_embeds.safetensors:my-cat",
        "--embedding MyStyle.safetensors:MyStyle",
    )
    assert student.source.sha256 == plain.source.sha256
    digests = student.source.part_sha256, plain.source.part_sha256
    assert digests[0]["text_encoder"] != digests[1]["text_encoder"]
    assert digests[0]["vae"] == digests[1]["vae"]
    assert torch.equal(text_of(student, ["a red fox"]), text_of(plain, ["a red fox"]))


def test_a_word_keeps_the_padding_of_the_tokenizer(tiny_pipeline, words, tmp_path):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"')
    )
    student = add_embedding(load_student(folder), words[0])
    assert tokenizer_of(student.tokenizer_folder, 77)(["<cat-toy>"])[0, -1] == 0


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # its process would end
@pytest.mark.parametrize("kind", ["a1111", "diffusers"])
def test_a_pickled_word_is_refused_with_the_line_that_converts_it(
    kind, tiny_pipeline, tmp_path, monkeypatch
):
    pickled = tmp_path / ("cat.pt" if kind == "a1111" else "learned_embeds.bin")
    saved = {"cat": VECTORS}
    if kind == "a1111":
        parameter = torch.nn.Parameter(VECTORS)
        saved = {"string_to_token": {"*": 265}, "string_to_param": {"*": parameter}, "name": "cat"}
    torch.save(saved, pickled)
    request = CheckpointRequest(str(tiny_pipeline), embedding=(str(pickled),))
    with pytest.raises(CheckpointError, match="is a pickle") as caught:
        load_for_method(request, None, SamplingOptions())
    program, _, code, *arguments = shlex.split(str(caught.value).splitlines()[-1])
    assert program == "python"
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    request = CheckpointRequest(str(tiny_pipeline), embedding=(arguments[1],))
    student = load_for_method(request, None, SamplingOptions())
    assert student.source.notes[-1].endswith("added as cat, 3 vectors")


def test_custom_diffusions_layers_compute_what_they_compute_in_diffusers(tiny_pipeline, tmp_path):
    theirs = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    generator = torch.Generator().manual_seed(3)
    processors = {}
    for name in theirs.attn_processors:
        layer = theirs.get_submodule(name.removesuffix(".processor"))
        processors[name] = CustomDiffusionAttnProcessor2_0(
            train_kv=layer.is_cross_attention,
            train_q_out=layer.is_cross_attention,
            hidden_size=layer.to_q.in_features,
            cross_attention_dim=32,
        )
        for weight in processors[name].parameters():
            weight.data.normal_(0, 0.2, generator=generator)
    theirs.set_attn_processor(processors)
    theirs.save_attn_procs(tmp_path, safe_serialization=True)
    (file,) = tmp_path.glob("*.safetensors")
    plain, ours = load_student(tiny_pipeline), add_embedding(load_student(tiny_pipeline), file)
    noise, text = (
        torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 77, 32))
    )
    with torch.no_grad():
        expected = theirs(noise, 500, text).sample
        torch.testing.assert_close(ours.unet(noise, 500, text).sample, expected)
        assert not torch.allclose(plain.unet(noise, 500, text).sample, expected, atol=0.01)
    assert ours.source.sha256 != plain.source.sha256
    assert embedding_options(ours.source) == (f"--embedding {file.name}",)


@pytest.mark.parametrize(
    ("text", "file", "token"),
    [
        ("a/cat.safetensors", "a/cat.safetensors", None),
        ("a/cat.safetensors:<cat>", "a/cat.safetensors", "<cat>"),
        ("C:\\cat.safetensors", "C:\\cat.safetensors", None),
    ],
)
def test_a_file_and_its_token_are_told_apart(text, file, token):
    assert embedding_from(text) == (Path(file), token)


@pytest.mark.parametrize("text", ["cat.safetensors:", "cat.safetensors:two words"])
def test_a_token_that_is_no_word_is_refused(text):
    with pytest.raises(UsageError, match="a token without spaces"):
        embedding_from(text)


@pytest.mark.parametrize(
    ("tensors", "token", "kind", "said"),
    [
        ({"a": VECTORS, "b": VECTORS}, None, CheckpointError, "it holds 2 tensors, the first is"),
        ({"a": torch.zeros(2, 2, 2)}, None, CheckpointError, r"has shape \(2, 2, 2\)"),
        ({"a": VECTORS * float("nan")}, None, CheckpointError, "is not finite"),
        ({"clip_g": VECTORS, "clip_l": VECTORS}, None, UnsupportedModelError, "32 and 32 wide"),
        ({"clip_g": VECTORS[:1], "clip_l": VECTORS}, None, CheckpointError, "expected as many"),
        ({"a": torch.zeros(1, 768)}, None, UnsupportedModelError, "its vectors are 768 wide"),
        ({"two words": VECTORS}, None, UsageError, "'two words'; expected one without spaces"),
        ({"fox</w>": VECTORS}, None, UsageError, "is in the vocabulary already"),
        ({"a.processor.to_x_custom_diffusion": VECTORS}, None, CheckpointError, "what is"),
        (
            {"a.processor.to_k_custom_diffusion.weight": VECTORS},
            None,
            UnsupportedModelError,
            r"its a\.to_k\.weight is \(3, 32\), this model's not there",
        ),
        ({"a.processor.to_k_custom_diffusion.weight": VECTORS}, "b", UsageError, "have no token"),
    ],
)
def test_what_is_no_learned_word_is_named(tensors, token, kind, said, tiny_pipeline, tmp_path):
    save_file({name: each.clone() for name, each in tensors.items()}, tmp_path / "word.safetensors")
    with pytest.raises(kind, match=said):
        add_embedding(load_student(tiny_pipeline), tmp_path / "word.safetensors", token)


@pytest.mark.parametrize("name", ["emb_params", "a.attn2.processor.to_k_custom_diffusion.weight"])
def test_learned_words_given_as_a_checkpoint_are_told_their_option(name, tmp_path):
    save_file({name: VECTORS}, tmp_path / "word.safetensors")
    with pytest.raises(UnsupportedModelError, match="a file of learned words") as caught:
        load_student(tmp_path / "word.safetensors")
    assert "this file with --embedding" in str(caught.value.next_step)


def test_a_token_is_added_once(tiny_pipeline, words):
    student = add_embedding(load_student(tiny_pipeline), words[0])
    for token in (None, "<CAT-toy>", "<cat-toy>_1"):
        with pytest.raises(UsageError, match="in the vocabulary already") as caught:
            add_embedding(student, words[0], token)
        assert "FILE:TOKEN" in str(caught.value.next_step)


def test_a_model_without_text_encoder_takes_no_word(tiny_pipeline, words):
    student = load_student(tiny_pipeline, without=("text_encoder",))
    with pytest.raises(TiueError, match="the checkpoint has none"):
        add_embedding(student, words[0])


def test_a_bundle_with_a_word_asks_for_its_model_with_it(tiny_pipeline, tiny_bundle, words):
    student = add_embedding(load_student(tiny_pipeline), words[0])
    manifest = replace(tiny_bundle.manifest, source=student.source)
    with pytest.raises(CheckpointError, match="is not the student of this bundle") as caught:
        as_exported(load_student(tiny_pipeline), manifest)
    assert "--embedding 'learned_embeds.safetensors:<cat-toy>'" in str(caught.value.next_step)
    assert as_exported(student, manifest).tokenizer_folder == student.tokenizer_folder
