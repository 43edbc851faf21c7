"""Regression to what the teacher draws of the same noise, beside score distillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from tiue_export.checkpoint.family import load_family
from tiue_export.train.config import DistillConfig
from tiue_export.train.distill import distill
from tiue_export.train.losses import pseudo_huber
from tiue_export.train.networks import load_networks
from tiue_export.train.score_distillation import ScoreDistillation, draw
from tiue_export.train.teacher_latents import starting_noise, teacher_latents

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "an owl", "a cat", "a dog", "a blue house", "two boats"]
SOLVER_STEPS = 4


@pytest.fixture(scope="module")
def config(tiny_distillation: DistillConfig, tmp_path_factory) -> DistillConfig:
    return replace(
        tiny_distillation,
        regression_weight=100.0,
        solver_steps=SOLVER_STEPS,
        # More than one file of 64, the last of them short.
        teacher_pictures=70,
        guidance=2.0,
        micro_batch=32,
        kl_weight=0.0,
        out=str(tmp_path_factory.mktemp("regression") / "run"),
    )


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    made = Accelerator(cpu=True)
    yield made
    made.state._reset_state(reset_partial_state=True)


@pytest.fixture
def method(config: DistillConfig, accelerator: Accelerator) -> ScoreDistillation:
    Path(config.out).mkdir(exist_ok=True)  # so has a run when it prepares
    method = ScoreDistillation(config, load_networks(config, CPU), PROMPTS, accelerator)
    method.prepare()
    return method


def test_a_sample_is_a_noise_its_prompt_and_what_the_teacher_drew_of_both(
    config, method, accelerator
):
    networks = method.networks
    pictures = teacher_latents(config, networks, PROMPTS, accelerator)
    config = replace(config, batch=70, micro_batch=70)  # a whole epoch: both files
    drawn = draw(config, PROMPTS, networks.latent_shape, 0, pictures=pictures)
    settings = {k: v for k, v in load_family("tiny").scheduler.items() if k.startswith("beta")}
    scheduler = DDIMScheduler(
        **settings, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    scheduler.set_timesteps(SOLVER_STEPS)
    text = networks.embed(drawn.prompts)
    null = networks.embed([""]).expand_as(text)
    teacher = load_networks(config, CPU).student.unet  # as the teacher was before any step
    sample = drawn.noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            with_prompt = teacher(sample, timestep, text).sample
            without = teacher(sample, timestep, null).sample
            guided = without + config.guidance * (with_prompt - without)
            sample = scheduler.step(guided, timestep, sample).prev_sample
    torch.testing.assert_close(drawn.teacher, sample, atol=5e-3, rtol=2e-3)
    assert len({noise.numpy().tobytes() for noise in drawn.noise}) == 70
    assert torch.equal(
        starting_noise(config, networks.latent_shape, [69])[0],
        starting_noise(config, networks.latent_shape, range(70))[69],
    )


def test_a_steps_figure_is_the_distance_to_the_teachers_picture_of_the_same_noise(
    config, method, accelerator
):
    networks = method.networks
    pictures = teacher_latents(config, networks, PROMPTS, accelerator)
    drawn = draw(config, PROMPTS, networks.latent_shape, 3, pictures=pictures)
    with torch.no_grad():
        latents = networks.student.sample(drawn.noise, networks.embed(drawn.prompts))
    expected = float(pseudo_huber(latents, drawn.teacher, config.huber_width))
    figures = method.step(3)
    assert figures["regression"] == pytest.approx(expected, rel=1e-4)
    assert (
        figures["loss"] > config.regression_weight * expected
    )  # score distillation is still there


def test_the_student_nears_the_teachers_pictures_and_resumes_on_them(config, method):
    figures = [method.step(step)["regression"] for step in range(20)]
    assert sum(figures[-4:]) < 0.9 * sum(figures[:4])
    # A run finds the pictures in its folder, and its student is the regression's.
    first = distill(replace(config, iterations=2))
    files = sorted((Path(config.out) / "teacher-latents").iterdir())
    written = [file.stat().st_mtime_ns for file in files]
    assert distill(replace(config, iterations=4)) == first
    assert [file.stat().st_mtime_ns for file in files] == written
    journal = (Path(config.out) / "journal.jsonl").read_text("utf-8").splitlines()
    assert len(journal) == 4
    assert all('"regression"' in line for line in journal)
