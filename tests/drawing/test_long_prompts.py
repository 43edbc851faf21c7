"""Prompts of more than 77 tokens: chunks as Stable Diffusion web UI has them, on every runtime."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from teachers import load_teacher
from transformers import CLIPTokenizer

from tiue_export import Pipeline, RuntimeOptions, export_onnx
from tiue_export.bundle.read import Bundle
from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.prompt_weights import weighted_tokens
from tiue_export.errors import BundleError, UsageError
from tiue_export.export.coreml.swift import check_swift
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference
from tiue_export.reference.fan_out_loss import fan_out_record
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.student.pipeline_folder import write_scheduler

PROMPT = "red fox " * 45 + "green owl " * 15  # 90 and 30 tokens
NEGATIVE = "blue cat"
SEED, STEPS, SCALE = 3, 3, 4.0


@pytest.fixture(scope="module")
def model(micro_pipeline, tmp_path_factory):
    """The smallest model as an ordinary one."""
    folder = shutil.copytree(micro_pipeline, tmp_path_factory.mktemp("long") / "model")
    write_scheduler(folder, load_family("tiny").scheduler, None)
    return folder


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    """Every step with an encoder run of its own: what diffusers' pipeline draws."""
    options = FasterOptions(steps=STEPS, key_steps=(0, 1, 2), inject="off", guidance=SCALE)
    folder = tmp_path_factory.mktemp("long") / "bundle"
    teacher = load_teacher(model, options=options)
    return export_onnx(teacher, folder, ExportOptions(max_prompt_tokens=150))


@pytest.fixture(scope="module")
def pipeline(bundle):
    with Pipeline.open(bundle) as pipeline:
        yield pipeline


def chunks_by_hand(tokenizer, prompt: str) -> list[list[int]]:
    """What transformers makes of each 75 words by themselves, padded to 77."""
    words = prompt.split()
    texts = [" ".join(words[:75]), " ".join(words[75:150])]
    return tokenizer(texts, padding="max_length", max_length=77).input_ids


@torch.no_grad()
def test_a_long_prompt_draws_what_diffusers_draws_from_its_chunks(model, pipeline):
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)

    def embedded(prompt: str) -> torch.Tensor:
        chunks = torch.tensor(chunks_by_hand(pipe.tokenizer, prompt))
        return torch.cat([pipe.text_encoder(c[None]).last_hidden_state for c in chunks], 1)

    expected = pipe(
        prompt_embeds=embedded(PROMPT),
        negative_prompt_embeds=embedded(NEGATIVE),
        latents=torch.from_numpy(noise_from_seed(SEED, (1, 4, 8, 8))),
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="latent",
    ).images.numpy()
    steering = {"seed": SEED, "negative_prompt": NEGATIVE}
    drawn = pipeline(PROMPT, **steering).pictures[0].latents
    first_chunk = pipeline(" ".join(PROMPT.split()[:75]), **steering).pictures[0].latents
    assert psnr_db(expected[0], drawn) > 100
    assert psnr_db(expected[0], first_chunk) < 60


def test_the_checkpoints_own_modules_draw_it_too(model, bundle, pipeline):
    options = RuntimeOptions(checkpoint=str(model))
    with Pipeline.open(bundle, "torch", options) as theirs:
        latents = theirs(PROMPT, seed=SEED).pictures[0].latents
    assert psnr_db(latents, pipeline(PROMPT, seed=SEED).pictures[0].latents) > 100


def test_both_chunks_of_the_reference_hold_words(bundle, pipeline):
    ids = load_reference(bundle).arrays["input_ids"].reshape(2, 77)
    assert not np.isin(ids[:, 1:76], pipeline.tokenizer([""])).any()


@pytest.mark.parametrize("words", [0, 1, 75, 76, 120, 150, 151])
def test_chunks_have_the_ids_that_transformers_gives_each_of_them(model, pipeline, words):
    theirs = CLIPTokenizer.from_pretrained(model / "tokenizer", local_files_only=True)
    prompt = " ".join(["fox", "owl"] * 80).rsplit(" ", 160 - words)[0] if words else ""
    ids = pipeline.tokenizer([prompt])
    assert ids.reshape(2, 77).tolist() == chunks_by_hand(theirs, prompt)


def test_weights_find_their_words_in_the_second_chunk(pipeline):
    tokens, weights = weighted_tokens(pipeline.tokenizer, ["fox " * 74 + "(owl cat:1.5)"])
    assert tokens[0].tolist() == pipeline.tokenizer(["fox " * 74 + "owl cat"])[0].tolist()
    assert np.flatnonzero(weights[0] != 1).tolist() == [75, 78]  # around end and start
    assert (weights[0, [75, 78]] == 1.5).all()


def test_what_is_beyond_the_limit_is_cut_and_the_option_is_named(pipeline, tiny_bundle):
    long, longer, short = ("fox " * count for count in (150, 1700, 76))
    assert pipeline.tokenizer.cut_note(long) is None
    assert pipeline.tokenizer.cut_note(longer) == (
        "the prompt has 1700 tokens, the last 1550 are cut: the bundle takes 150; exported with "
        "--max-prompt-tokens 1500 it takes more"
    )
    longest = replace(pipeline.tokenizer, length=20 * 77, chunks=20)
    assert longest.cut_note(longer).endswith("the last 200 are cut: the bundle takes 1500")
    with Pipeline.open(tiny_bundle) as plain:
        assert "the last 1 are cut: the bundle takes 75" in plain.tokenizer.cut_note(short)
        assert "--max-prompt-tokens 150" in plain.tokenizer.cut_note(short)


@pytest.mark.parametrize(
    ("tokens", "near"), [(0, 75), (-75, 75), (77, 150), (154, 225), (100_000, 1500)]
)
def test_a_limit_that_is_no_number_of_chunks_is_refused(tiny_student, tokens, near):
    with pytest.raises(UsageError) as caught:
        shapes_of(tiny_student, ExportOptions(max_prompt_tokens=tokens))
    assert caught.value.message == (
        f"--max-prompt-tokens is {tokens}; expected a multiple of 75, which the text encoder reads "
        "at once, up to 1500"
    )
    assert caught.value.next_step == f"Write --max-prompt-tokens {near}."


def test_75_tokens_are_what_is_taken_without_the_option(tiny_student):
    asked, plain = ExportOptions(max_prompt_tokens=75), ExportOptions()
    assert shapes_of(tiny_student, asked) == shapes_of(tiny_student, plain)


def test_rows_that_part_late_are_measured_on_long_prompts(tiny_student):
    options = ExportOptions(max_prompt_tokens=150, fan_out=FanOut(1))
    tokenizer = tokenizer_of(tiny_student.tokenizer_folder, 154, 2)
    assert 10 < fan_out_record(tiny_student, options, tokenizer).value < 120


def test_the_swift_program_refuses_a_bundle_of_long_prompts(tiny_bundle):
    manifest = replace(tiny_bundle.manifest, text_chunks=2)
    with pytest.raises(UsageError, match=r"what takes long prompts: the Swift program lays"):
        check_swift(Bundle(tiny_bundle.root, manifest))


def test_inspect_says_how_long_prompts_may_be(run, bundle):
    assert "up to 150 tokens" in run("inspect", bundle.root)[1]


@pytest.mark.parametrize("chunks", [0, -1, 3])
def test_a_manifest_whose_chunks_do_not_fit_its_text_is_refused(bundle, chunks):
    text = replace(bundle.manifest, text_chunks=chunks).to_json()
    with pytest.raises(BundleError, match=rf"\(1, 154, 32\) cannot be {chunks} chunks"):
        type(bundle.manifest).from_json(text, "tiue.json")
