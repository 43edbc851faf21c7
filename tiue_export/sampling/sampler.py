"""The one loop of every plan, in numpy: passes in order, an encoder run and a decoder batch each.

It knows neither schedulers nor backends: the plan holds every coefficient, `run` runs a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tiue_export.errors import UsageError
from tiue_export.sampling.picture_start import Kept
from tiue_export.sampling.plan import Combination, Pass, Plan, check_guidance, steps_within
from tiue_export.specs import CONTROLNET, UNET_DECODER, UNET_ENCODER, Array, Feeds

Run = Callable[[str, Feeds], Mapping[str, Array]]
# (steps done, steps in all): called whenever decoder rows are finished.
OnStep = Callable[[int, int], None]


def sample(
    plan: Plan,
    run: Run,
    noises: Array,
    text: Array,
    guidance: float | Sequence[float] | None = None,
    on_step: OnStep = lambda done, total: None,
    control: Feeds | None = None,
    kept: Kept | None = None,
) -> Array:
    """Noises (N, B, 4, H, W) and text -> latents (B, 4, H, W); N is `plan.noises`.

    Text is (B, L, D), with guidance (2B, L, D), unconditional rows first. `guidance` is one scale,
    or one for each row b; None is the plan's. Sums run in float64. `control` is what a ControlNet
    is fed beside the sample: controlnet_cond (B, 3, 8H, 8W) in [0, 1] and conditioning_scale (1,).
    It runs where the encoder does. `kept` is what stays as it is, outside a mask.
    """
    if plan.one_pass:  # timesteps and the sum are constants of the graphs
        pool = {"sample": noises[0], "encoder_hidden_states": text}
        latents = run(UNET_DECODER, {**pool, **run(UNET_ENCODER, pool)})["latents"]
    else:
        outputs = sampled_outputs(plan, run, noises, text, guidance, on_step, control, kept)
        latents = combined(plan.latents, noises, outputs)
    return latents if kept is None else kept.latents(latents)


def sampled_outputs(
    plan: Plan,
    run: Run,
    noises: Array,
    text: Array,
    guidance: float | Sequence[float] | None = None,
    on_step: OnStep = lambda done, total: None,
    control: Feeds | None = None,
    kept: Kept | None = None,
) -> Array:
    """The network's outputs after guidance, (rows, B, 4, H, W) float32, of a plan in passes."""
    shape = noises.shape[1:]  # (B, 4, H, W)
    scales = None
    if plan.guidance is not None:
        scales = guidance_rows(plan.guidance if guidance is None else guidance, shape[0])
    outputs = np.zeros((plan.rows, *shape), np.float32)
    for number, one in enumerate(plan.passes):
        fed = combined(one.input, noises, outputs)  # (B, 4, H, W)
        feeds = encoder_feeds(one, fed if kept is None else kept.sample(number, fed), text)
        features = run(UNET_ENCODER, feeds)
        if control is not None:
            features = added(features, run(CONTROLNET, {**feeds, **control}))
        row = one.first_row
        for timesteps in pieces(one, plan.max_decoder_rows, plan.copies * shape[0]):
            pool = {**features, "encoder_hidden_states": text, "timesteps": timesteps}
            rows = run(UNET_DECODER, pool)["outputs"]
            outputs[row : row + len(timesteps)] = by_step(rows, len(timesteps), scales)
            row += len(timesteps)
            on_step(row, plan.rows)
    return outputs


def added(features: Mapping[str, Array], residuals: Mapping[str, Array]) -> dict[str, Array]:
    """The encoder's features with a ControlNet's residuals added by name."""
    return {name: feature + residuals[name] for name, feature in features.items()}


def encoder_feeds(one: Pass, sample: Array, text: Array) -> dict[str, Array]:
    """What the encoder takes in a pass: the sample (B, 4, H, W), for each of the text's copies."""
    return {
        "sample": np.concatenate([sample] * (len(text) // len(sample))),  # (copies * B, 4, H, W)
        "timestep": np.array([one.encoder_timestep], np.float32),
        "encoder_hidden_states": text,
    }


def pieces(one: Pass, max_rows: int | None, rows_per_step: int) -> Iterator[Array]:
    """A pass's timesteps (g,) float32, in runs of at most `max_rows` decoder rows."""
    timesteps = np.array(one.timesteps, np.float32)
    size = len(timesteps)
    if max_rows is not None:
        size = steps_within(max_rows, rows_per_step)
    for first in range(0, len(timesteps), size):
        yield timesteps[first : first + size]


def by_step(rows: Array, steps: int, scales: Array | None) -> Array:
    """Rows (g * copies * B, 4, H, W), step-major -> outputs (g, B, 4, H, W), guided by `scales`."""
    if scales is None:
        plain: Array = rows.reshape(steps, -1, *rows.shape[1:])
        return plain
    halves = rows.reshape(steps, 2, len(scales), *rows.shape[1:])  # (g, 2, B, 4, H, W)
    without, conditioned = halves[:, 0], halves[:, 1]
    mixed: Array = without + scales[:, None, None, None] * (conditioned - without)
    return mixed


def combined(terms: Combination, noises: Array, outputs: Array) -> Array:
    """The combination of noises (N, B, 4, H, W) and outputs (n, B, 4, H, W), float32.

    As many fresh noises and outputs are used as there are coefficients.
    """
    total: npt.NDArray[np.float64] = terms.noise * noises[0].astype(np.float64)
    for weights, arrays in ((terms.fresh, noises[1:]), (terms.outputs, outputs)):
        # float64 by type: a Python number would let the product stay in float32.
        for weight, array in zip(np.array(weights, np.float64), arrays, strict=False):
            if weight != 0:
                total += weight * array
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
