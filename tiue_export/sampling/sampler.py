"""The loop of Faster Diffusion in numpy: groups in order, one encoder run and one batch each.

It knows neither schedulers nor backends: the plan holds every coefficient, `run` runs a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.sampling.plan import FasterPlan, Group, check_guidance, steps_within
from tiue_export.sampling.schedule import Schedule
from tiue_export.specs import CONTROLNET, UNET_DECODER, UNET_ENCODER, Array, Feeds

Run = Callable[[str, Feeds], Mapping[str, Array]]
# (steps done, steps in all): called whenever decoder rows are finished.
OnStep = Callable[[int, int], None]


def sample_latents(
    schedule: Schedule,
    plan: FasterPlan,
    run: Run,
    noise: Array,
    text: Array,
    guidance: float | Sequence[float] | None = None,
    on_step: OnStep = lambda done, total: None,
    control: Feeds | None = None,
) -> Array:
    """Noise (B, 4, H, W) and text (2B, L, D), unconditional rows first -> latents (B, 4, H, W).

    `guidance` is one scale, or one for each row b; None is the plan's. Sums run in float64.
    `control` is what a ControlNet is fed beside the sample: controlnet_cond (B, 3, 8H, 8W) in
    [0, 1] and conditioning_scale (1,). It runs at key steps only.
    """
    outputs = guided_outputs(schedule, plan, run, noise, text, guidance, on_step, control)
    return combination(schedule.noise_coefficient, schedule.output_coefficients, noise, outputs)


def guided_outputs(
    schedule: Schedule,
    plan: FasterPlan,
    run: Run,
    noise: Array,
    text: Array,
    guidance: float | Sequence[float] | None = None,
    on_step: OnStep = lambda done, total: None,
    control: Feeds | None = None,
) -> Array:
    """The network's outputs after guidance, (n, B, 4, H, W) float32, one for each step."""
    scales = guidance_rows(plan.guidance if guidance is None else guidance, len(noise))
    total = len(schedule.timesteps)
    outputs = np.zeros((total, *noise.shape), np.float32)
    for group in plan.groups:
        start = combination(group.noise_coefficient, group.output_coefficients, noise, outputs)
        feeds = encoder_feeds(group, start, text)
        features = run(UNET_ENCODER, feeds)
        if control is not None:
            features = added(features, run(CONTROLNET, {**feeds, **control}))
        done = group.first_step
        for timesteps in pieces(group, plan.max_decoder_rows, 2 * len(noise)):
            pool = {**features, "encoder_hidden_states": text, "timesteps": timesteps}
            rows = run(UNET_DECODER, pool)["outputs"]
            outputs[done : done + len(timesteps)] = guided(rows, len(timesteps), scales)
            done += len(timesteps)
            on_step(done, total)
    return outputs


def added(features: Mapping[str, Array], residuals: Mapping[str, Array]) -> dict[str, Array]:
    """The encoder's features with a ControlNet's residuals added by name."""
    return {name: feature + residuals[name] for name, feature in features.items()}


def encoder_feeds(group: Group, sample: Array, text: Array) -> dict[str, Array]:
    """What the encoder takes at a group's key step: the same sample for both halves of the rows."""
    return {
        "sample": np.concatenate([sample, sample]),  # (2B, 4, H, W)
        "timestep": np.array(group.timesteps[:1], np.float32),
        "encoder_hidden_states": text,
    }


def pieces(group: Group, max_rows: int | None, rows_per_step: int) -> Iterator[Array]:
    """A group's timesteps (g,) float32, in runs of at most `max_rows` decoder rows."""
    timesteps = np.array(group.timesteps, np.float32)
    size = len(timesteps)
    if max_rows is not None:
        size = steps_within(max_rows, rows_per_step)
    for first in range(0, len(timesteps), size):
        yield timesteps[first : first + size]


def guided(rows: Array, steps: int, scales: Array) -> Array:
    """Rows (g * 2B, 4, H, W), step-major -> unconditional + scale * difference, (g, B, 4, H, W)."""
    halves = rows.reshape(steps, 2, len(scales), *rows.shape[1:])  # (g, 2, B, 4, H, W)
    without, conditioned = halves[:, 0], halves[:, 1]
    mixed: Array = without + scales[:, None, None, None] * (conditioned - without)
    return mixed


def combination(
    noise_coefficient: float, output_coefficients: Sequence[float], noise: Array, outputs: Array
) -> Array:
    """S * noise + sum_i E_i * outputs[i] for as many outputs as there are coefficients, float32."""
    weights = np.array(output_coefficients, np.float64)
    total = noise_coefficient * noise.astype(np.float64)
    for weight, output in zip(weights, outputs, strict=False):
        if weight != 0:
            total += weight * output
    return total.astype(np.float32)


def guidance_rows(guidance: float | Sequence[float], batch: int) -> Array:
    """One float32 scale for each of B rows; 1 is the prompt alone, without guidance."""
    given = np.atleast_1d(np.asarray(guidance, np.float32))
    if given.shape not in ((1,), (batch,)):
        raise UsageError(
            f"guidance has {given.size} scales for {batch} pictures; expected 1 or {batch}"
        )
    for scale in given:
        check_guidance(float(scale))
    return np.broadcast_to(given, (batch,))
