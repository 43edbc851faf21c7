"""The closed formula against diffusers' scheduler, one-hot probing and the paper's misprint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from tiue_export.errors import ScheduleError, UsageError
from tiue_export.sampling.ddim import alphas_cumprod, one_pass_plan

SD = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
STEPS = (2, 4, 8, 16, 32, 50)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def ddim(config: dict, steps: int, *, exact: bool) -> DDIMScheduler:
    """diffusers' scheduler of a configuration; `exact` gives it float64 alphas."""
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    scheduler = DDIMScheduler.from_config({"clip_sample": False, **settings})
    scheduler.set_timesteps(steps)
    if exact:
        scheduler.alphas_cumprod = torch.from_numpy(alphas_cumprod(config))
        one = torch.tensor(1.0, dtype=torch.float64)
        to_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = one if to_one else scheduler.alphas_cumprod[0]
    return scheduler


def loop(scheduler: DDIMScheduler, noise: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    latents = noise
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        latents = scheduler.step(output, timestep, latents).prev_sample
    return latents


def closed(plan, noise: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(plan.latents.outputs, dtype=torch.float64)
    return plan.latents.noise * noise + torch.einsum("k,k...->...", weights, outputs)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_closed_form_equals_the_scheduler_loop(steps, prediction, spacing):
    config = {**SD, "prediction_type": prediction, "timestep_spacing": spacing}
    plan = one_pass_plan(config, steps)
    scheduler = ddim(config, steps, exact=True)
    assert list(plan.timesteps) == scheduler.timesteps.tolist()
    random = torch.Generator().manual_seed(steps)
    noise = torch.randn(4, 3, dtype=torch.float64, generator=random)
    outputs = torch.randn(steps, 4, 3, dtype=torch.float64, generator=random)
    expected = loop(scheduler, noise, outputs)
    torch.testing.assert_close(closed(plan, noise, outputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_closed_form_equals_diffusers_own_float32_alphas_to_their_rounding(steps, prediction):
    config = {**SD, "prediction_type": prediction}
    plan = one_pass_plan(config, steps)
    noise = torch.linspace(-2, 2, 50, dtype=torch.float64)
    outputs = torch.cos(torch.arange(steps * 50, dtype=torch.float64)).reshape(steps, 50)
    expected = loop(ddim(config, steps, exact=False), noise, outputs)
    torch.testing.assert_close(closed(plan, noise, outputs), expected, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_coefficients_come_out_of_the_loop_when_probed_with_unit_vectors(steps, prediction):
    config = {**SD, "prediction_type": prediction}
    plan = one_pass_plan(config, steps)
    unit = torch.eye(steps + 1, dtype=torch.float64)
    probed = loop(ddim(config, steps, exact=True), unit[0], unit[1:])
    expected = [plan.latents.noise, *plan.latents.outputs]
    np.testing.assert_allclose(probed.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_k4_constants_of_stable_diffusion_are_the_known_ones():
    plan = one_pass_plan(SD, 4)
    assert plan.timesteps == (751, 501, 251, 1)
    assert plan.latents.noise == pytest.approx(4.234611527763419, rel=1e-14)
    expected = (-2.491944645645955, -0.924900656805782, -0.6568043592345006, -0.0121420901646632)
    assert plan.latents.outputs == pytest.approx(expected, rel=1e-12)


def test_v_prediction_agrees_with_its_angular_closed_form():
    plan = one_pass_plan({**SD, "prediction_type": "v_prediction"}, 4)
    alphas = alphas_cumprod(SD)
    angles = np.arccos(np.sqrt([alphas[t] for t in (*plan.timesteps, 0)]))
    turns = angles[:-1] - angles[1:]
    assert plan.latents.noise == pytest.approx(np.prod(np.cos(turns)), rel=1e-12)
    for row, weight in enumerate(plan.latents.outputs):
        expected = -np.sin(turns[row]) * np.prod(np.cos(turns[row + 1 :]))
        assert weight == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 4, 8, 16])
def test_the_papers_printed_weights_do_not_match(steps):
    """Eq. 11 as printed carries sqrt(a_0 / a_t) for t >= 2; the loop's weights lack 1/sqrt(a_t)."""
    plan = one_pass_plan(SD, steps)
    alphas = alphas_cumprod(SD)
    chain = [*(alphas[t] for t in plan.timesteps), alphas[0]]
    printed = [
        np.sqrt(alphas[0] / chain[row])
        * (np.sqrt(1 / chain[row + 1] - 1) - np.sqrt(1 / chain[row] - 1))
        for row in range(steps)
    ]
    relative = np.abs(np.array(printed) / plan.latents.outputs - 1)
    assert (relative[:-1] > 0.03).all()
    assert relative[-1] < 1e-3  # the last step is printed right, a_1 being almost 1


def test_linspace_steps_to_t_minus_stride_not_to_the_next_listed_timestep():
    config = {**SD, "timestep_spacing": "linspace"}
    plan, alphas = one_pass_plan(config, 4), alphas_cumprod(SD)
    assert plan.timesteps == (999, 666, 333, 0)
    naive = np.sqrt(alphas[0] / alphas[999])
    assert abs(plan.latents.noise / naive - 1) > 0.1


@given(st.integers(2, 200), st.sampled_from(PREDICTIONS), st.floats(1e-5, 2e-3))
def test_weights_agree_with_the_loop_for_any_step_count_and_betas(steps, prediction, start):
    config = {**SD, "prediction_type": prediction, "beta_start": start}
    plan = one_pass_plan(config, steps)
    unit = torch.eye(steps + 1, dtype=torch.float64)
    probed = loop(ddim(config, steps, exact=True), unit[0], unit[1:]).numpy()
    expected = [plan.latents.noise, *plan.latents.outputs]
    np.testing.assert_allclose(probed, expected, rtol=1e-9, atol=1e-9)


def test_zero_snr_betas_agree_with_diffusers():
    config = {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ours = alphas_cumprod(config)
    theirs = ddim(config, 4, exact=False).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    trailing = {**config, "timestep_spacing": "trailing"}
    assert one_pass_plan(trailing, 4).timesteps[0] == 999


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_beta_schedule_agrees_with_diffusers(kind):
    config = {**SD, "beta_schedule": kind}
    theirs = ddim(config, 4, exact=False).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=2e-4, atol=1e-7)


def test_a_pndm_configuration_never_clips_and_keeps_its_own_defaults():
    saved = {k: v for k, v in PNDMScheduler().config.items() if k != "_use_default_values"}
    plan = one_pass_plan({**saved, "_class_name": "PNDMScheduler"}, 4)
    assert plan.timesteps == (750, 500, 250, 0)
    assert one_pass_plan({"_class_name": "PNDMScheduler"}, 4) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_sample": True}, "clip_sample=True, which clips every intermediate sample"),
        ({"thresholding": True}, "thresholding=True"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'; expected epsilon"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; expected linear"),
        ({"timestep_spacing": "karras"}, "timestep_spacing is 'karras'; expected leading"),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "EulerAncestralDiscreteScheduler"),
        ({"rescale_betas_zero_snr": True}, "divided by zero"),
        ({"steps_offset": 400}, "with steps_offset 400 gives timesteps [1150"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has shape (2,)"),
    ],
)
def test_what_breaks_the_closed_form_is_refused_by_name(change, message):
    with pytest.raises(ScheduleError) as caught:
        one_pass_plan({**SD, **change}, 4)
    assert message in str(caught.value)


def test_ddim_without_an_explicit_clip_sample_is_refused_because_its_default_clips():
    config = {**SD, "_class_name": "DDIMScheduler"}
    with pytest.raises(ScheduleError, match="clip_sample=True"):
        one_pass_plan(config, 4)


def test_a_class_without_set_alpha_to_one_must_say_it():
    config = {k: v for k, v in SD.items() if k != "set_alpha_to_one"}
    with pytest.raises(ScheduleError, match="has no set_alpha_to_one"):
        one_pass_plan({**config, "_class_name": "EulerDiscreteScheduler"}, 4)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_one_step_that_returns_the_noise_is_refused(spacing):
    with pytest.raises(ScheduleError, match="returns the input noise unchanged"):
        one_pass_plan({**SD, "timestep_spacing": spacing}, 1)


def test_one_step_on_a_trailing_schedule_is_a_real_step():
    plan = one_pass_plan({**SD, "timestep_spacing": "trailing"}, 1)
    assert plan.timesteps == (999,)
    assert abs(plan.latents.outputs[0]) > 10


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(UsageError, match="expected 1 to 1000"):
        one_pass_plan(SD, steps)


def test_merging_moves_the_last_weight_to_its_neighbour_and_keeps_the_sum():
    plan = one_pass_plan(SD, 4)
    merged = plan.merged(0.02)
    assert merged.timesteps == (751, 501, 251)
    assert merged.merged_timesteps == (1,)
    assert (merged.steps, merged.rows) == (4, 3)
    assert sum(merged.latents.outputs) == pytest.approx(sum(plan.latents.outputs))
    assert merged.latents.outputs[-1] == pytest.approx(-0.6568043592 - 0.0121420902)


def test_merging_below_a_huge_weight_keeps_the_first_row():
    merged = one_pass_plan(SD, 4).merged(1e9)
    assert merged.timesteps == (751,)
    assert merged.merged_timesteps == (501, 251, 1)
