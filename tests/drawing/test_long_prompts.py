"""Prompts of more than 77 tokens: chunks as Stable Diffusion web UI has them, exact on runtimes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from teachers import load_teacher

from tiue_export import Pipeline, export_onnx
from tiue_export.checkpoint.family import load_family
from tiue_export.drawing.prompt_weights import weighted_tokens
from tiue_export.drawing.tokenizer import open_tokenizer
from tiue_export.errors import UsageError
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.student.pipeline_folder import write_scheduler

WORDS = [*("red fox " * 45).split(), *("green owl " * 15).split()]  # 90 and 30
PROMPT, NEGATIVE = " ".join(WORDS), "blue cat"
SEED, STEPS, SCALE = 3, 3, 4.0


@pytest.fixture(scope="module")
def model(micro_pipeline, tmp_path_factory):
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


def by_hand(pipe, prompt: str) -> torch.Tensor:
    """Two chunks of 75 words through transformers' own text encoder, end to end: (1, 154, D)."""
    words = prompt.split()
    chunks = []
    for part in (words[:75], words[75:150]):
        ids = pipe.tokenizer(
            " ".join(part), padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        chunks.append(pipe.text_encoder(ids).last_hidden_state)
    return torch.cat(chunks, 1)


@torch.no_grad()
def test_a_long_prompt_draws_what_diffusers_draws_from_its_chunks(model, bundle):
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    expected = (
        pipe(
            prompt_embeds=by_hand(pipe, PROMPT),
            negative_prompt_embeds=by_hand(pipe, NEGATIVE),
            latents=torch.from_numpy(noise_from_seed(SEED, (1, 4, 8, 8))),
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="latent",
        )
        .images[0]
        .numpy()
    )
    with Pipeline.open(bundle) as pipeline:
        drawn = pipeline(PROMPT, seed=SEED, negative_prompt=NEGATIVE).pictures[0].latents
        cut = pipeline(" ".join(WORDS[:75]), seed=SEED, negative_prompt=NEGATIVE).pictures[0]
    assert psnr_db(expected, drawn) > 100
    assert psnr_db(expected, cut.latents) < 60  # the second chunk counts
