"""Latent consistency distillation: its loss, its data, its student, held against diffusers' own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tiue_export.checkpoint.family import load_family
from tiue_export.errors import CheckpointError, UsageError
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.sampling.ddim import alphas_cumprod
from tiue_export.train.config import DistillConfig
from tiue_export.train.consistency import ConsistencyDistillation
from tiue_export.train.consistency_losses import (
    Solver,
    consistency,
    predicted_picture,
)
from tiue_export.train.distill import distill
from tiue_export.train.losses import add_noise, pseudo_huber
from tiue_export.train.networks import Networks, load_networks
from tiue_export.train.prompts import read_prompts

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "an owl", "a cat", "a dog", "a blue house", "two boats"]
SOLVER_STEPS = 8


@pytest.fixture(scope="module")
def config(tiny_distillation: DistillConfig, tmp_path_factory) -> DistillConfig:
    return replace(
        tiny_distillation,
        method="lcm",
        lora_rank=64,  # no setting of this method: the default
        solver_steps=SOLVER_STEPS,
        sample_every=4,
        teacher_pictures=8,
        guidance=2.0,
        samples_per_prompt=1,
        out=str(tmp_path_factory.mktemp("lcm") / "unbroken"),
    )


@pytest.fixture(scope="module")
def unbroken(config: DistillConfig) -> Path:
    """The run folder of `config`, trained without a break."""
    distill(config)
    return Path(config.out)


@pytest.fixture(scope="module")
def networks(config: DistillConfig) -> Networks:
    """What `config` starts from. Shared: do not change it."""
    return load_networks(config, CPU)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    made = Accelerator(cpu=True)
    yield made
    made.state._reset_state(reset_partial_state=True)


def lcm_scheduler(student: Path) -> LCMScheduler:
    return LCMScheduler.from_pretrained(student / "scheduler")


def ddim(steps: int) -> DDIMScheduler:
    """DDIM over the timesteps that LCMScheduler is distilled on."""
    settings = {k: v for k, v in load_family("tiny").scheduler.items() if k.startswith("beta")}
    scheduler = DDIMScheduler(
        **settings, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    return scheduler


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_sha256(out: Path) -> str:
    file = out / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def journal(out: Path) -> list[dict[str, float]]:
    lines = (out / "journal.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


# The loss


def test_at_timestep_0_the_student_is_the_identity_whatever_its_network_says(networks):
    noisy, predicted = normal(2, 3, 4, 8, 8)
    at_zero = torch.zeros(3, dtype=torch.int64)
    got = consistency(noisy, predicted, at_zero, networks.alphas[at_zero])
    torch.testing.assert_close(got, noisy, rtol=0, atol=0)


def test_the_boundary_scalings_are_lcm_schedulers_own(networks):
    timesteps = torch.tensor([0, 1, 19, 499, 999])
    noisy, predicted = normal(2, 5, 4, 8, 8)
    alphas = networks.alphas[timesteps]
    picture = predicted_picture(noisy, predicted, alphas)
    got = consistency(noisy, predicted, timesteps, alphas)
    for row, timestep in enumerate(timesteps.tolist()):
        skip, out = LCMScheduler().get_scalings_for_boundary_condition_discrete(timestep)
        torch.testing.assert_close(got[row], skip * noisy[row] + out * picture[row])


@pytest.mark.parametrize("steps", [7, 20, 50])
def test_the_solver_is_diffusers_ddim_down_to_the_schedules_first_alpha(networks, steps):
    solver, scheduler = Solver.over(networks.alphas, steps), ddim(steps)
    training_grid = LCMScheduler(original_inference_steps=steps)
    training_grid.set_timesteps(steps)
    assert solver.timesteps.flip(0).tolist() == training_grid.timesteps.tolist()
    assert (int(solver.targets[0]), float(solver.target_alphas[0])) == (0, networks.alphas[0])
    assert solver.targets[1:].tolist() == solver.timesteps[:-1].tolist()
    if 1000 % steps:
        return  # there DDIM's own spacing rounds otherwise than LCM's
    noisy, predicted = normal(2, steps, 4, 8, 8)
    stepped = solver.step(noisy, predicted, torch.arange(steps))
    for index, timestep in enumerate(solver.timesteps):
        wanted = scheduler.step(predicted[index], timestep, noisy[index]).prev_sample
        torch.testing.assert_close(stepped[index], wanted, atol=1e-4, rtol=1e-4)


def test_a_model_that_knows_the_picture_has_nothing_to_learn(networks):
    solver, picture = Solver.over(networks.alphas, SOLVER_STEPS), normal(1, 4, 8, 8)
    # Beyond the last step, which ends where a little noise is left: the boundary keeps that.
    indices = torch.arange(1, SOLVER_STEPS)
    alphas, timesteps = solver.alphas[indices], solver.timesteps[indices]
    noise = normal(len(indices), 4, 8, 8, seed=1)
    noisy = add_noise(picture.expand_as(noise), noise, alphas)
    nearer = solver.step(noisy, noise, indices)  # on the line between picture and noise
    target = consistency(nearer, noise, solver.targets[indices], solver.target_alphas[indices])
    exact = consistency(noisy, noise, timesteps, alphas)
    wrong = consistency(noisy, noise + 0.1, timesteps, alphas)
    assert float(pseudo_huber(exact, target, 0.001)) < 1e-4
    assert float(pseudo_huber(wrong, target, 0.001)) > 0.05


def test_the_loss_is_a_distance_that_is_round_at_zero():
    zeros = torch.zeros(4)
    assert float(pseudo_huber(zeros, zeros, 0.01)) == 0
    assert float(pseudo_huber(zeros + 5, zeros, 0.01)) == pytest.approx(5, abs=0.011)
    assert float(pseudo_huber(zeros + 1e-3, zeros, 0.1)) == pytest.approx(1e-6 / 0.2, rel=1e-3)


def test_a_steps_loss_is_the_papers_recomputed_by_diffusers(config, unbroken, accelerator):
    method = ConsistencyDistillation(
        replace(config, out=str(unbroken)), load_networks(config, CPU), PROMPTS, accelerator
    )
    method.prepare()
    # The average lags behind, so that taking the wrong one of the two shows.
    with torch.no_grad():
        for shadow in method.average.weights.shadow_params:
            shadow.mul_(0.99)
    drawn, networks, scheduler = method.draw(3), method.networks, ddim(SOLVER_STEPS)
    student: Any = networks.student.unet
    target = UNet2DConditionModel.from_config(student.config)
    target.load_state_dict({name: value * 0.99 for name, value in student.state_dict().items()})
    lcm, losses = LCMScheduler(), []
    grid = torch.arange(1, SOLVER_STEPS + 1) * (1000 // SOLVER_STEPS) - 1

    def mapped(unet: Any, sample: Tensor, timestep: int, text: Tensor) -> Tensor:
        predicted = unet(sample, timestep, text).sample
        alpha = scheduler.alphas_cumprod[timestep]
        picture = (sample - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(timestep)
        return skip * sample + out * picture

    with torch.no_grad():
        for row, prompt in enumerate(drawn.prompts):
            index = int(drawn.indices[row])
            timestep, nearer = int(grid[index]), int(grid[index - 1]) if index else 0
            text, null = networks.embed([prompt]), networks.embed([""])
            clean, noise = drawn.latents[row : row + 1], drawn.noise[row : row + 1]
            noisy = scheduler.add_noise(clean, noise, torch.tensor([timestep]))
            conditional, without = (
                networks.teacher(noisy, timestep, embedded).sample for embedded in (text, null)
            )
            guided = without + config.guidance * (conditional - without)
            stepped = scheduler.step(guided, timestep, noisy).prev_sample
            gap = mapped(student, noisy, timestep, text) - mapped(target, stepped, nearer, text)
            losses.append(((gap**2 + config.huber_width**2) ** 0.5 - config.huber_width).mean())
    assert method.step(3)["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-3)


# What it learns on


def test_the_teachers_pictures_are_its_own_guided_ddim(config, unbroken, networks):
    (file,) = (unbroken / "teacher-latents").iterdir()
    latents = load_file(file)["latents"]
    assert (latents.dtype, tuple(latents.shape)) == (torch.float16, (8, *networks.latent_shape))
    # Picture 7 shows prompt 7 - 6; prompts are shuffled by read_prompts.
    prompt = read_prompts(Path(config.prompts))[1]
    noise = np.random.default_rng([config.seed, 1, 0]).standard_normal(latents.shape, np.float32)
    scheduler, sample = ddim(SOLVER_STEPS), torch.from_numpy(noise[7:])
    both = torch.cat([networks.embed([""]), networks.embed([prompt])])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            without, conditional = networks.teacher(
                torch.cat([sample] * 2), timestep, both
            ).sample.chunk(2)
            guided = without + config.guidance * (conditional - without)
            sample = scheduler.step(guided, timestep, sample).prev_sample
    torch.testing.assert_close(latents[7:].float(), sample, atol=5e-3, rtol=2e-3)


def test_damaged_pictures_are_named_and_drawn_again_once_removed(config, unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    file = out / "teacher-latents" / "0000000.safetensors"
    drawn = file.read_bytes()
    file.write_bytes(drawn[:-8])
    with pytest.raises(CheckpointError, match="does not hold the teacher's latents") as caught:
        distill(replace(config, out=str(out)))
    assert caught.value.next_step == f"Remove {file}; the same command draws it again."
    file.unlink()
    distill(replace(config, out=str(out)))
    assert file.read_bytes() == drawn


def test_processes_share_one_draw_of_pictures_that_fit_their_prompts(
    config, unbroken, networks, accelerator, monkeypatch
):
    method = ConsistencyDistillation(
        replace(config, out=str(unbroken)), networks, PROMPTS, accelerator
    )
    method.prepare()
    whole = method.draw(0)
    numbers = [
        int((method._latents == row).flatten(1).all(1).nonzero()) for row in whole.latents.half()
    ]
    assert whole.prompts == [PROMPTS[number % len(PROMPTS)] for number in numbers]
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(type(accelerator), "process_index", rank)
        halves.append(method.draw(0))
    assert halves[0].prompts + halves[1].prompts == whole.prompts
    assert torch.equal(torch.cat([half.noise for half in halves]), whole.noise)


# A whole run


def test_a_run_leaves_a_student_that_diffusers_draws_with_by_its_own_scheduler(
    config, unbroken, networks
):
    pipeline = StableDiffusionPipeline.from_pretrained(unbroken / "student", safety_checker=None)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    settings = pipeline.scheduler.config
    assert (settings.original_inference_steps, settings.timestep_scaling) == (SOLVER_STEPS, 10.0)
    assert settings.prediction_type == "epsilon"
    own = torch.from_numpy(alphas_cumprod(load_family("tiny").scheduler)).float()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, own)
    assert pipeline.unet.config.get("time_cond_proj_dim") is None
    assert "tiue_steps" not in settings
    told = load_for_method(
        CheckpointRequest(str(unbroken / "student")), None, SamplingOptions()
    ).plan
    assert (told.recipe, told.steps, told.noises, told.guidance) == ("lcm", 4, 4, None)
    assert told.timesteps == (999, 749, 499, 249)
    moved = [
        float((value - networks.teacher.state_dict()[name]).abs().max())
        for name, value in pipeline.unet.state_dict().items()
    ]
    assert max(moved) > 1e-4
    assert [set(line) for line in journal(unbroken)] == [{"step", "loss", "gradient_norm"}] * 4
    with Image.open(unbroken / "samples" / "step-000004.png") as picture:
        assert picture.size == (64, 2 * 64)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_samples_are_drawn_as_lcm_scheduler_draws(
    config, unbroken, accelerator, monkeypatch, steps
):
    config = replace(config, steps=steps)
    networks = load_networks(config, CPU)
    method = ConsistencyDistillation(config, networks, PROMPTS, accelerator)
    text, noises = networks.embed(["an owl"]), normal(steps, 1, *networks.latent_shape)
    scheduler, fresh = lcm_scheduler(unbroken / "student"), iter(noises[1:])
    scheduler.set_timesteps(steps)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(fresh)
    )
    sample = noises[0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            predicted = networks.student.unet(sample, timestep, text).sample
            sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
        torch.testing.assert_close(method.sample(noises, text), sample, atol=1e-4, rtol=1e-4)


def test_a_run_broken_off_and_resumed_ends_with_the_same_bits(config, unbroken, tmp_path):
    halfway = replace(config, out=str(tmp_path / "run"), iterations=2)
    distill(halfway)
    shutil.rmtree(tmp_path / "run" / "teacher-latents")  # drawn again, the same
    distill(replace(halfway, iterations=4))
    assert unet_sha256(tmp_path / "run") == unet_sha256(unbroken)
    assert journal(tmp_path / "run") == journal(unbroken)


def test_other_steps_draw_other_samples_of_the_same_run(config, unbroken, tmp_path):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    distill(replace(config, out=str(out), steps=1))
    assert unet_sha256(out) == unet_sha256(unbroken)
    picture = "samples/step-000004.png"
    assert (out / picture).read_bytes() != (unbroken / picture).read_bytes()
    with pytest.raises(UsageError, match=r"huber_width was 0\.001, is 0\.1"):
        distill(replace(config, out=str(out), huber_width=0.1))


def test_training_goes_on_from_a_trained_student(config, unbroken):
    loaded = load_networks(replace(config, student=str(unbroken / "student")), CPU)
    written = load_file(unbroken / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    started = loaded.student.unet.state_dict()
    assert all(torch.equal(started[name], value.float()) for name, value in written.items())
