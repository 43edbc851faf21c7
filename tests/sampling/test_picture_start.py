"""Plans that start from a picture are what diffusers' schedulers compute from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from few_step_schedulers import CLASSES, SD15
from hypothesis import given
from hypothesis import strategies as st

from tiue_export.errors import UsageError
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
from tiue_export.sampling.key_step_options import FasterOptions, ddim_plan
from tiue_export.sampling.picture_start import Kept, NoiseLevel, initial_noise, noise_levels
from tiue_export.sampling.plan_change import PlanChange, changed_plan
from tiue_export.sampling.recipes import recipe_named, recipes
from tiue_export.sampling.sampler import combined, sample
from tiue_export.sampling.strength import first_step, least_steps, least_strength

SHAPE = (1, 4, 8, 8)
STRENGTHS = (0.3, 0.5, 0.8, 1.0)
CASES = [
    (recipe.name, strength)
    for recipe in recipes().values()
    for strength in STRENGTHS
    if recipe.scheduler in CLASSES and not (recipe.starts_once and strength < 1)
]


def started_plan(name: str, strength: float):
    """A recipe's plan of 4 steps, without guidance, as a drawing from a picture changes it."""
    recipe = recipe_named(name)
    guidance = 1.0 if recipe.guidance == "rows" else None
    steps = 4 if recipe.chooses_steps else recipe.usual_steps
    options = FewStepOptions(steps=steps, allow_other_steps=True, guidance=guidance)
    plan = few_step_plan(SD15, recipe, options)
    opened = replace(plan, open_time=plan.one_pass)  # as an export for pictures leaves it
    return changed_plan(SD15, opened, PlanChange(strength=strength))


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """Something that depends on the sample and the timestep, and not linearly."""
    return torch.tanh(0.7 * sample) + 0.001 * float(timestep)


def run(graph: str, feeds):
    """The network as two graphs, in numpy."""
    if graph == "unet_encoder":
        return {"seen": feeds["sample"]}
    seen = torch.from_numpy(feeds["seen"])
    return {"outputs": network(seen, float(feeds["timesteps"][0])).numpy()}


def seeded(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def diffusers_start(plan, strength: float):
    """The scheduler as img2img pipelines set it, and the timesteps that they do."""
    recipe = recipe_named(plan.recipe)
    predicts = {"prediction_type": recipe.prediction_type or "epsilon"}
    made = CLASSES[plan.scheduler].from_config({**SD15, **predicts}, timestep_spacing="trailing")
    if plan.scheduler == "lcm" and not recipe.timesteps:  # LatentConsistencyModelImg2ImgPipeline
        made.set_timesteps(plan.steps, strength=strength)
        return made, made.timesteps
    if recipe.timesteps:
        made.set_timesteps(timesteps=list(recipe.timesteps[plan.steps]))
    else:
        made.set_timesteps(plan.steps)
    # StableDiffusionImg2ImgPipeline.get_timesteps
    first = max(plan.steps - min(int(plan.steps * strength), plan.steps), 0)
    if hasattr(made, "set_begin_index"):
        made.set_begin_index(first)
    return made, made.timesteps[first:]


def diffusers_draws(plan, strength, picture, noise, mask=None, *, pure=False):
    """The loop of diffusers' img2img and inpainting pipelines, from their schedulers."""
    scheduler, timesteps = diffusers_start(plan, strength)
    generator = torch.Generator().manual_seed(7)
    extra = {"generator": generator} if plan.scheduler != "ddim" else {}
    if plan.scheduler == "tcd":
        extra["eta"] = plan.eta
    if pure:
        sample = noise * scheduler.init_noise_sigma
    else:
        sample = scheduler.add_noise(picture, noise, timesteps[:1])
    for number, timestep in enumerate(timesteps):
        seen = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(network(seen, timestep), timestep, sample, **extra).prev_sample
        if mask is not None:  # StableDiffusionInpaintPipeline
            own = picture
            if number < len(timesteps) - 1:
                own = scheduler.add_noise(picture, noise, timesteps[number + 1 : number + 2])
            sample = (1 - mask) * own + mask * sample
    return sample.numpy()


def draws(plan, picture, noise, mask=None, *, pure=False):
    """The same by the plan; fresh noises are those that a scheduler's generator gives."""
    drawn = torch.Generator().manual_seed(7)
    fresh = [torch.randn(SHAPE, generator=drawn).numpy() for _ in range(plan.noises - 1)]
    levels = noise_levels(SD15, plan)
    start = noise if pure else initial_noise(plan, levels[0], picture, noise)
    kept = None if mask is None else Kept(mask, picture, noise, levels)
    text = np.zeros((1, 1, 1), np.float32)
    return sample(plan, run, np.stack([start, *fresh]), text, kept=kept)


@pytest.mark.parametrize(("name", "strength"), CASES)
def test_a_drawing_from_a_picture_is_diffusers_own(name, strength):
    plan = started_plan(name, strength)
    assert plan.problem() is None
    assert not plan.one_pass
    picture, noise = seeded(1), seeded(2)
    expected = diffusers_draws(plan, strength, picture, noise)
    assert psnr_db(expected, draws(plan, picture.numpy(), noise.numpy())) > 110


@pytest.mark.parametrize(("name", "strength"), CASES)
def test_what_a_mask_keeps_is_blended_as_in_diffusers(name, strength):
    plan = started_plan(name, strength)
    picture, noise, mask = seeded(1), seeded(2), (seeded(3) > 0).float()[:, :1]
    pure = strength == 1
    expected = diffusers_draws(plan, strength, picture, noise, mask, pure=pure)
    given = picture.numpy(), noise.numpy(), mask.numpy()
    latents = draws(plan, *given, pure=pure)
    assert psnr_db(expected, latents) > 110
    outside = np.broadcast_to(mask.numpy() == 0, latents.shape)
    np.testing.assert_array_equal(latents[outside], picture.numpy()[outside])


@pytest.mark.parametrize("strength", [0.1, 0.31, 0.75, 1.0])
def test_faster_diffusion_starts_where_ddim_would(strength):
    config = {**SD15, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    plan = ddim_plan(config, FasterOptions(steps=10, key_steps="uniform:1", guidance=1.0))
    changed = changed_plan(config, plan, PlanChange(strength=strength))
    assert changed.injection is None
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[10 - int(10 * strength) :]
    assert changed.timesteps == tuple(timesteps.tolist())
    picture, noise = seeded(1), seeded(2)
    expected = scheduler.add_noise(picture, noise, timesteps[:1])
    outputs = []
    for timestep in timesteps:
        outputs.append(network(expected, timestep).numpy())
        expected = scheduler.step(torch.from_numpy(outputs[-1]), timestep, expected).prev_sample
    start = initial_noise(changed, noise_levels(config, changed)[0], picture.numpy(), noise.numpy())
    latents = combined(changed.latents, start[None], np.stack(outputs))
    assert psnr_db(expected.numpy(), latents) > 110


def test_key_steps_before_the_start_move_to_it():
    config = {**SD15, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    plan = ddim_plan(config, FasterOptions(steps=20, key_steps=(0, 1, 5, 12)))
    changed = changed_plan(config, plan, PlanChange(strength=0.6))  # 12 of 20 are left: from 8 on
    assert changed.key_steps == (0, 4)
    assert changed.rows == 12


def test_a_students_first_timestep_is_its_own_strength():
    plan = one_pass_plan({**SD15, "timestep_spacing": "leading", "set_alpha_to_one": False}, 4)
    (level,) = noise_levels(SD15, plan)
    assert plan.one_pass
    assert plan.timesteps[0] == 751
    assert level.picture**2 + level.noise**2 == pytest.approx(1)
    picture, noise = seeded(1).numpy(), seeded(2).numpy()
    np.testing.assert_allclose(
        initial_noise(plan, level, picture, noise), level.mix(picture, noise), rtol=1e-6
    )
    with pytest.raises(UsageError, match="the plan of one pass is held by the graphs"):
        changed_plan(SD15, plan, PlanChange(strength=0.5))


def test_rectified_flow_mixes_picture_and_noise_by_its_time():
    plan = few_step_plan(
        SD15,
        recipe_named("instaflow"),
        FewStepOptions(steps=4, strength=0.5, allow_other_steps=True),
    )
    assert plan.timesteps == (500, 250)
    assert noise_levels(SD15, plan) == (NoiseLevel(0.5, 0.5), NoiseLevel(0.75, 0.25))


def test_a_student_of_one_step_takes_as_many_as_leave_one():
    plan = few_step_plan(SD15, recipe_named("sd-turbo"), FewStepOptions(steps=1))
    opened = changed_plan(SD15, replace(plan, open_time=True), PlanChange(strength=0.5))
    assert (opened.steps, opened.timesteps) == (2, (499,))


@pytest.mark.parametrize("strength", [0.01, 0.07, 0.1, 0.29, 0.3, 1 / 3, 0.58, 0.7, 1.0])
def test_the_least_number_of_steps_leaves_one_and_no_smaller_one_does(strength):
    steps = least_steps(strength)
    assert first_step(steps, strength) == steps - 1
    if steps > 1:
        with pytest.raises(UsageError, match="leaves none to do"):
            first_step(steps - 1, strength)


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_strength_that_is_no_share_is_refused(strength):
    with pytest.raises(UsageError, match=r"expected more than 0 .* to 1"):
        started_plan("sd-turbo", strength)


def test_what_leaves_too_few_timesteps_says_which_strength_would_do():
    with pytest.raises(UsageError, match=r"leaves 2 of the 50 timesteps") as error:
        started_plan("lcm", 0.05)
    assert error.value.next_step == "Type --strength 0.08, or fewer --steps"
    assert started_plan("lcm", 0.08).rows == 4


@pytest.mark.parametrize("name", [r.name for r in recipes().values() if r.starts_once])
def test_a_student_of_one_timestep_starts_there_or_says_so(name):
    with pytest.raises(UsageError, match=r"predicts at t = \d+ alone") as error:
        started_plan(name, 0.8)
    assert error.value.next_step == "Type --strength 1"
    assert started_plan(name, 1.0).rows == 1


def test_steps_whose_timesteps_are_named_are_cut_and_no_other_number_is_proposed():
    assert started_plan("dmd2", 0.5).timesteps == (499, 249)
    with pytest.raises(UsageError, match=r"--strength 0.2 of 4 steps leaves none") as error:
        started_plan("dmd2", 0.2)
    assert error.value.next_step == "Type --strength 0.25"
    assert started_plan("dmd2", 0.25).timesteps == (249,)


@given(steps=st.integers(1, 1000), part=st.integers(1, 1000))
def test_the_strength_that_is_proposed_leaves_as_many_steps_and_hardly_less_would(steps, part):
    left = min(steps, part)
    strength = least_strength(left, steps)
    assert int(steps * strength) >= left
    assert int(steps * (strength - 0.002)) < left


def test_injection_is_not_for_a_drawing_from_a_picture():
    config = {**SD15, "_class_name": "DDIMScheduler", "set_alpha_to_one": False}
    plan = ddim_plan(config, FasterOptions(steps=10))
    with pytest.raises(UsageError, match="--inject on adds the noise"):
        changed_plan(config, plan, PlanChange(strength=0.5, inject="on"))
