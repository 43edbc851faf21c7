"""Few-step students' plans are what diffusers' own schedulers compute, fresh noise included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from few_step_schedulers import CLASSES, SD15

from tiue_export.errors import ScheduleError, UsageError
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
from tiue_export.sampling.plan_change import PlanChange, changed_plan
from tiue_export.sampling.recipes import recipe_named, recipes
from tiue_export.sampling.sampler import combined

SHAPE = (1, 4, 8, 8)
CASES = [
    (recipe.name, steps)
    for recipe in recipes().values()
    if recipe.scheduler in CLASSES
    for steps in sorted(recipe.steps)
]


def plan_for(name: str, config=SD15, **options):
    """A recipe's plan."""
    return few_step_plan(config, recipe_named(name), FewStepOptions(**options))


def diffusers_scheduler(plan, prediction: str):
    """The scheduler as its users make it: from Stable Diffusion's configuration."""
    kind = CLASSES[plan.scheduler]
    named = recipe_named(plan.recipe)
    predicts = {"prediction_type": named.prediction_type or prediction}
    made = kind.from_config({**SD15, **predicts}, timestep_spacing="trailing")
    if plan.steps in named.timesteps:
        made.set_timesteps(timesteps=list(plan.timesteps))
    else:
        made.set_timesteps(plan.steps)
    return made


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Something that depends on the sample and the timestep, and not linearly."""
    return torch.tanh(0.7 * sample) + 0.001 * float(timestep)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_it_draws_what_diffusers_own_scheduler_draws(name, steps, prediction):
    plan = plan_for(name, {**SD15, "prediction_type": prediction}, steps=steps)
    scheduler = diffusers_scheduler(plan, prediction)
    np.testing.assert_allclose(scheduler.timesteps, plan.timesteps)
    # What the scheduler draws itself, from its own generator: nothing of it is replaced.
    drawn = torch.Generator().manual_seed(7)
    fresh = [torch.randn(SHAPE, generator=drawn) for _ in range(plan.noises - 1)]
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    extra = {"generator": generator} if plan.scheduler != "ddim" else {}
    if plan.scheduler == "tcd":
        extra["eta"] = plan.eta
    sample, seen, outputs = noise * scheduler.init_noise_sigma, [], []
    for timestep in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(sample, timestep))
        outputs.append(network(seen[-1], timestep))
        sample = scheduler.step(outputs[-1], timestep, sample, **extra).prev_sample
    noises, given = np.stack([noise, *fresh]), np.stack(outputs)
    for number, one in enumerate(plan.passes):
        assert psnr_db(seen[number].numpy(), combined(one.input, noises, given)) > 115
    assert psnr_db(sample.numpy(), combined(plan.latents, noises, given)) > 115


def test_rectified_flow_is_flow_matching_with_the_velocity_turned_round():
    plan = plan_for("instaflow", steps=4)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / 4 for k in range(4)])
    np.testing.assert_allclose(scheduler.timesteps, plan.timesteps)
    sample = noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    outputs = []
    for timestep in scheduler.timesteps:
        outputs.append(network(sample, timestep))
        sample = scheduler.step(-outputs[-1], timestep, sample).prev_sample
    latents = combined(plan.latents, noise[None].numpy(), np.stack(outputs))
    np.testing.assert_allclose(latents, sample, atol=1e-5)


def test_time_of_rectified_flow_need_not_be_whole():
    plan = plan_for("instaflow", steps=3, allow_other_steps=True)
    assert plan.timesteps == (1000, pytest.approx(2000 / 3), pytest.approx(1000 / 3))


# Computed by hand from the papers' formulas, five digits.
PUBLISHED = {
    ("lcm-lora", 4): (14.6488, (-14.6146, -4.2606, -1.6129, -0.7194), (4.2606, 1.6129, 0.7194)),
    ("sd-turbo", 1): (14.6146, (-14.6146,), ()),
    ("swiftbrush", 1): (14.5865, (-14.5522,), ()),
    ("instaflow", 1): (1.0, (1.0,), ()),
}


@pytest.mark.parametrize(("name", "steps"), PUBLISHED)
def test_unrolled_it_has_the_published_constants(name, steps):
    latents = plan_for(name, steps=steps, allow_other_steps=True).latents
    noise, outputs, fresh = PUBLISHED[name, steps]
    assert latents.noise == pytest.approx(noise, abs=1e-4)
    assert latents.outputs == pytest.approx(outputs, abs=1e-4)
    assert latents.fresh == pytest.approx(fresh, abs=1e-4)


def test_one_step_of_tcd_is_one_row_of_trailing_ddim():
    (trailing,) = one_pass_plan({**SD15, "timestep_spacing": "trailing"}, 1).latents.outputs
    for eta in (0.0, 0.3, 1.0):
        assert plan_for("tcd", steps=1, eta=eta).latents.outputs == (pytest.approx(trailing),)


def test_euler_is_trailing_ddim_to_alpha_one_but_for_how_it_starts():
    ddim = plan_for("hyper-sd-4", {**SD15, "set_alpha_to_one": True})
    euler = plan_for("sd-turbo", steps=4)
    assert euler.latents.outputs == pytest.approx(ddim.latents.outputs, rel=1e-9)
    assert euler.latents.noise / ddim.latents.noise == pytest.approx(0.99767, abs=1e-5)
    assert euler.passes[0].input.noise == pytest.approx(0.99767, abs=1e-5)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_makes_a_plan_that_agrees_with_itself(name):
    plan = plan_for(name)
    assert plan.problem() is None
    assert (plan.method, plan.recipe) == ("few-step", name)
    assert plan.steps == recipe_named(name).usual_steps == len(plan.timesteps)
    assert plan.one_pass == (plan.steps == 1)


def test_steps_that_share_an_encoder_are_rows_of_one_pass():
    plan = plan_for("lcm-lora", key_steps="0,2")
    own = plan_for("lcm-lora")
    assert [one.timesteps for one in plan.passes] == [(999, 759), (499, 259)]
    assert plan.passes[1].input == own.passes[2].input
    assert plan.latents == own.latents
    assert (plan.open_rows, plan.key_steps) == (True, (0, 2))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("hyper-sd-4", {"steps": 3}, "--steps is 3; recipe hyper-sd-4 is for 4"),
        ("sd-turbo", {"steps": 0}, "--steps is 0; expected 1 or more"),
        ("sd-turbo", {"guidance": 7.5}, "--guidance is 7.5; recipe sd-turbo has its guidance dist"),
        ("sd-turbo", {"eta": 0.3}, "--eta is for recipes of the tcd scheduler; sd-turbo has euler"),
        ("tcd", {"eta": 1.5}, r"--eta is 1.5; expected 0 \(no fresh noise\) to 1"),
        ("pcm-cfg", {"guidance": 0.5}, "guidance is 0.5; expected 1"),
        ("lcm", {"steps": 60, "allow_other_steps": True}, "--steps is 60; the student was dist"),
        ("lcm", {"key_steps": "1,2"}, "does not start at 0"),
        ("dmd2", {"steps": 2, "allow_other_steps": True}, "names its timesteps, and for 1 and 4"),
    ],
)
def test_what_a_recipe_does_not_take_is_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        plan_for(name, **options)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_a_sampler_that_clips_is_refused(key):
    with pytest.raises(ScheduleError, match=f"the scheduler has {key}=True"):
        plan_for("lcm-lora", {**SD15, key: True})


def test_guidance_is_told_apart_by_how_it_is_applied():
    assert plan_for("lcm").embedded_guidance == 8.0
    assert plan_for("lcm", guidance=5).embedded_guidance == 5.0
    assert plan_for("lcm").guidance is None
    assert plan_for("pcm-cfg").guidance == 7.5
    assert plan_for("lcm-lora", guidance=1.5).guidance == 1.5
    assert plan_for("lcm-lora").guidance is None
    assert plan_for("sd-turbo", guidance=0).guidance is None


def test_a_saved_lcm_scheduler_without_betas_has_its_classes_own():
    bare = plan_for("lcm", {"_class_name": "LCMScheduler"})
    assert bare.latents == plan_for("lcm").latents


def test_a_bundles_steps_can_be_changed_without_a_scheduler_library():
    plan = plan_for("lcm")
    assert changed_plan(SD15, plan, PlanChange(steps=8)) == plan_for("lcm", steps=8)
    kept = changed_plan(SD15, plan_for("tcd", eta=0.7), PlanChange(steps=2))
    assert kept == plan_for("tcd", steps=2, eta=0.7)
    single = changed_plan(SD15, plan_for("sd-turbo", steps=4), PlanChange(steps=1))
    assert single == replace(plan_for("sd-turbo", steps=1), open_time=True)


def test_a_plan_that_graphs_hold_is_not_changed():
    with pytest.raises(UsageError, match="the plan of one pass is held by the graphs"):
        changed_plan(SD15, plan_for("sd-turbo", steps=1), PlanChange(steps=2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (PlanChange(key_steps="0,2"), "decoder takes one step at a time"),
        (PlanChange(inject="on"), "--inject is for Faster Diffusion"),
        (PlanChange(steps=9), "--steps is 9; recipe sd-turbo is for 1, 2, 3, 4"),
    ],
)
def test_what_the_graphs_hold_is_not_changed(change, said):
    with pytest.raises(UsageError, match=said):
        changed_plan(SD15, plan_for("sd-turbo", steps=4), change)
