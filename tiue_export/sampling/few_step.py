"""Few-step students' samplers as steps of plain numbers, float64: what diffusers' schedulers do.

Each is affine in the sample, the network's output and fresh noise, so a plan of passes holds it.
The tests and every export hold the numbers against diffusers' own schedulers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiue_export.errors import ScheduleError, UsageError
from tiue_export.sampling.ddim import alphas_cumprod, ddim_settings, ddim_steps, ode_step
from tiue_export.sampling.key_step_plan import key_steps_from
from tiue_export.sampling.plan import Plan, check_decoder_rows, check_guidance
from tiue_export.sampling.recipes import EMBEDDED, NO_GUIDANCE, ROWS, Recipe
from tiue_export.sampling.strength import check_strength, first_step, least_strength
from tiue_export.sampling.trajectory import (
    LinearStep,
    key_steps_after,
    linear_trajectory,
    passes_of,
)

METHOD = "few-step"
# Every step runs the encoder.
ALL_STEPS = "uniform:1"
_SPACING = "trailing"
# diffusers' LCMScheduler and TCDScheduler: their defaults where a configuration lacks a key.
_CONSISTENCY_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_CONSISTENCY_CLASSES = ("LCMScheduler", "TCDScheduler")
_ORIGINAL_STEPS = 50
_TIMESTEP_SCALING = 10.0
_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class FewStepOptions:
    """What differs from a recipe's usual; None is the recipe's own.

    `key_steps` is spelled as on the command line, or numbers: the steps that run the encoder.
    `strength`: the share of the noise to start with, of a drawing that starts from a picture.
    """

    steps: int | None = None
    key_steps: str | tuple[int, ...] = ALL_STEPS
    guidance: float | None = None
    eta: float | None = None
    max_decoder_rows: int | None = None
    allow_other_steps: bool = False
    strength: float | None = None


def few_step_plan(config: Mapping[str, Any], recipe: Recipe, options: FewStepOptions) -> Plan:
    """The plan of a recipe on a checkpoint's scheduler_config.json.

    The configuration gives the noise schedule and the prediction type; the recipe the rest. Raises
    `UsageError` for options that the recipe does not take, `ScheduleError` for a noise schedule
    that is none.
    """
    steps = checked_steps(recipe, options.steps, options.allow_other_steps)
    eta = _checked_eta(recipe, steps, options.eta)
    rows_scale, embedded = _guidance(recipe, options.guidance)
    check_decoder_rows(options.max_decoder_rows)
    if options.strength is not None:
        check_strength(options.strength)
    settings = schedule_settings(config, recipe)
    request = _Request(settings, recipe, steps, eta, options.strength)
    start, listed = _SAMPLERS[recipe.scheduler](request)
    first = 0
    if options.strength is not None and not recipe.rescales_steps:
        if recipe.starts_once and options.strength < 1:
            raise UsageError(
                f"--strength is {options.strength:g}; recipe {recipe.name} predicts at "
                f"t = {listed[0].timestep:g} alone",
                "Type --strength 1",
            )
        first = first_step(steps, options.strength, fixed=bool(recipe.timesteps))
    if first:  # at a picture, which takes the place of the noise
        start, listed = 1.0, listed[first:]
    trajectory = linear_trajectory(start, listed)
    chosen = options.key_steps
    keys = key_steps_from(chosen, steps) if isinstance(chosen, str) else chosen
    return Plan(
        method=METHOD,
        recipe=recipe.name,
        steps=steps,
        passes=passes_of(trajectory, key_steps_after(first, keys)),
        latents=trajectory.combination(len(listed)),
        prediction_type=str(settings["prediction_type"]),
        scheduler=recipe.scheduler,
        timestep_spacing=_SPACING,
        guidance=rows_scale,
        embedded_guidance=embedded,
        eta=eta,
        max_decoder_rows=options.max_decoder_rows,
        chosen_by=chosen if isinstance(chosen, str) else "list",
    )


def checked_steps(
    recipe: Recipe, steps: int | None, allow_other: bool = False, *, or_else: str = ""
) -> int:
    """The number of steps; refuses one that the student was not trained for.

    `or_else` ends the next step where the number can be had all the same.
    """
    if steps is None:
        return recipe.usual_steps
    if steps < 1:
        raise UsageError(f"--steps is {steps}; expected 1 or more")
    if steps not in recipe.steps and not allow_other:
        taken = ", ".join(map(str, sorted(recipe.steps)))
        raise UsageError(
            f"--steps is {steps}; recipe {recipe.name} is for {taken}",
            f"Type --steps {recipe.usual_steps}{or_else}",
        )
    return steps


def _checked_eta(recipe: Recipe, steps: int, eta: float | None) -> float:
    if eta is None:
        return recipe.eta_of(steps)
    if recipe.scheduler != "tcd":
        raise UsageError(
            f"--eta is for recipes of the tcd scheduler; {recipe.name} has {recipe.scheduler}",
            "Leave --eta out.",
        )
    if not 0 <= eta <= 1:
        raise UsageError(f"--eta is {eta:g}; expected 0 (no fresh noise) to 1")
    return eta


def _guidance(recipe: Recipe, scale: float | None) -> tuple[float | None, float | None]:
    """The scale that is applied when drawing, and the one that is folded into the network."""
    if recipe.guidance == NO_GUIDANCE:
        # 0 and 1 are how other programs spell "off".
        if scale not in (None, 0.0, 1.0):
            raise UsageError(
                f"--guidance is {scale:g}; recipe {recipe.name} has its guidance distilled in",
                "Leave --guidance out.",
            )
        return None, None
    chosen = recipe.guidance_scale if scale is None else scale
    assert chosen is not None
    check_guidance(chosen)
    if recipe.guidance == EMBEDDED:
        return None, float(chosen)
    assert recipe.guidance == ROWS
    return (float(chosen) if chosen > 1 else None), None


def schedule_settings(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """A checkpoint's noise schedule and prediction type, every key there.

    Raises `ScheduleError` for what no plan can hold, such as clipping.
    """
    consistent = config.get("_class_name") in _CONSISTENCY_CLASSES
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    settings = {
        "clip_sample": False,
        "set_alpha_to_one": consistent,
        **(_CONSISTENCY_BETAS if consistent else {}),
        **own,
        "_class_name": "DDIMScheduler",
        "timestep_spacing": _SPACING,
    }
    if recipe.prediction_type is not None:
        # Of rectified flow no scheduler of diffusers knows the prediction: checked as any other.
        settings["prediction_type"] = "epsilon"
    checked = ddim_settings(settings)
    if recipe.prediction_type is not None:
        checked["prediction_type"] = recipe.prediction_type
    return checked


class _Request(NamedTuple):
    """What a sampler is asked for: `schedule_settings`, and the options with the recipe's usual."""

    settings: Mapping[str, Any]
    recipe: Recipe
    steps: int
    eta: float
    strength: float | None


# -> the initial sample as a multiple of the noise, and the steps.
_Sampler = Callable[[_Request], tuple[float, list[LinearStep]]]


def _lcm(asked: _Request) -> tuple[float, list[LinearStep]]:
    """Luo et al. 2023: x0 by the boundary-condition scalings, noised anew to the next timestep."""
    settings, alphas = asked.settings, alphas_cumprod(asked.settings)
    timesteps = _consistency_timesteps(asked)
    scaling = float(settings.get("timestep_scaling", _TIMESTEP_SCALING))
    listed = []
    for timestep, following in zip(timesteps, (*timesteps[1:], None), strict=True):
        kept, added = _moved(float(alphas[timestep]), 1.0, settings["prediction_type"])
        scaled = timestep * scaling
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
        kept, added, fresh = out * kept + skip, out * added, 0.0
        if following is not None:
            target = float(alphas[following])
            kept, added, fresh = target**0.5 * kept, target**0.5 * added, (1 - target) ** 0.5
        listed.append(LinearStep(timestep, kept, added, fresh))
    return 1.0, listed


def _tcd(asked: _Request) -> tuple[float, list[LinearStep]]:
    """Zheng et al. 2024, Algorithm 4 (gamma-sampling): down to (1 - eta) t', noised up to t'."""
    settings, alphas = asked.settings, alphas_cumprod(asked.settings)
    timesteps = _consistency_timesteps(asked)
    listed = []
    for timestep, following in zip(timesteps, (*timesteps[1:], None), strict=True):
        target = float(alphas[following or 0])
        between = float(alphas[int((1 - asked.eta) * (following or 0))])
        kept, added = _moved(float(alphas[timestep]), between, settings["prediction_type"])
        fresh = 0.0
        if following is not None and asked.eta > 0:
            ratio = target / between
            kept, added, fresh = ratio**0.5 * kept, ratio**0.5 * added, (1 - ratio) ** 0.5
        listed.append(LinearStep(timestep, kept, added, fresh))
    return 1.0, listed


def _euler(asked: _Request) -> tuple[float, list[LinearStep]]:
    return _sigma_steps(asked, ancestral=False)


def _euler_ancestral(asked: _Request) -> tuple[float, list[LinearStep]]:
    return _sigma_steps(asked, ancestral=True)


def _sigma_steps(asked: _Request, *, ancestral: bool) -> tuple[float, list[LinearStep]]:
    """Karras et al. 2022 in sigmas: the network sees x / sqrt(sigma^2 + 1)."""
    settings, alphas = asked.settings, alphas_cumprod(asked.settings)
    timesteps = [int(step.timestep) for step in ddim_steps(settings, asked.steps)]
    sigmas = [float(((1 - alphas[t]) / alphas[t]) ** 0.5) for t in timesteps]
    listed = []
    for timestep, sigma, target in zip(timesteps, sigmas, (*sigmas[1:], 0.0), strict=True):
        fresh = (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5 if ancestral else 0.0
        down = (target**2 - fresh**2) ** 0.5
        kept, added = _denoised(sigma, settings["prediction_type"])
        ratio = down / sigma  # x' = x0 + (x - x0) down / sigma
        scale = (sigma**2 + 1) ** -0.5
        listed.append(
            LinearStep(timestep, ratio + (1 - ratio) * kept, (1 - ratio) * added, fresh, scale)
        )
    return sigmas[0], listed


def _ddim(asked: _Request) -> tuple[float, list[LinearStep]]:
    return 1.0, ddim_steps(asked.settings, asked.steps)


def _flow(asked: _Request) -> tuple[float, list[LinearStep]]:
    """Liu et al. 2023 (arXiv 2309.06380): x += v / N from t = 1000 down."""
    count, steps = int(asked.settings["num_train_timesteps"]), asked.steps
    times = [count * (1 - step / steps) for step in range(steps)]
    return 1.0, [LinearStep(int(t) if t.is_integer() else t, 1.0, 1 / steps) for t in times]


def _x0(asked: _Request) -> tuple[float, list[LinearStep]]:
    """One prediction of x0 at the last timestep, with the alpha that training had there."""
    settings, alpha = asked.settings, asked.recipe.alpha
    last = int(settings["num_train_timesteps"]) - 1
    if alpha is None:
        alpha = float(alphas_cumprod(settings)[last])
    return 1.0, [LinearStep(last, *_moved(alpha, 1.0, settings["prediction_type"]))]


_SAMPLERS: Mapping[str, _Sampler] = MappingProxyType(
    {
        "lcm": _lcm,
        "tcd": _tcd,
        "euler": _euler,
        "euler-ancestral": _euler_ancestral,
        "ddim": _ddim,
        "flow": _flow,
        "x0": _x0,
    }
)


def _consistency_timesteps(asked: _Request) -> tuple[int, ...]:
    """Evenly spaced among the timesteps of the distillation; see diffusers' set_timesteps.

    LCM's of a lower strength are spaced among the lower share of them, all steps done.
    """
    settings, recipe, steps = asked.settings, asked.recipe, asked.steps
    if steps in recipe.timesteps:
        return recipe.timesteps[steps]
    if recipe.timesteps:
        known = " and ".join(map(str, recipe.timesteps))
        raise UsageError(
            f"--steps is {steps}; recipe {recipe.name} names its timesteps, and for {known} alone",
            f"Type --steps {recipe.usual_steps}",
        )
    count = int(settings["num_train_timesteps"])
    original = int(settings.get("original_inference_steps", _ORIGINAL_STEPS))
    if not 1 <= steps <= original <= count:
        raise UsageError(
            f"--steps is {steps}; the student was distilled on {original} steps, of which it takes "
            "some",
            f"Give --steps 1 to {min(original, count)}.",
        )
    taken = original
    if asked.strength is not None and recipe.rescales_steps:
        taken = int(original * asked.strength)
        if taken < steps:
            raise UsageError(
                f"--strength {asked.strength:g} leaves {taken} of the {original} timesteps of the "
                f"distillation for {steps} steps",
                f"Type --strength {least_strength(steps, original):g}, or fewer --steps",
            )
    trained: npt.NDArray[np.int64] = np.arange(taken, 0, -1) * (count // original) - 1
    chosen = np.floor(np.linspace(0, taken, num=steps, endpoint=False)).astype(np.int64)
    return tuple(int(t) for t in trained[chosen])


def _moved(alpha: float, target: float, prediction_type: str) -> tuple[float, float]:
    """The sample at another noise level (1: x0), on the ODE's line: factors of sample and output.

    Raises `ScheduleError` where the noise schedule leaves it undefined.
    """
    try:
        return ode_step(alpha, target, prediction_type)
    except ZeroDivisionError as error:
        raise ScheduleError(
            f"the noise schedule has alpha {alpha:g} at a timestep of the sampler, where a "
            f"{prediction_type} prediction is divided by zero"
        ) from error


def _denoised(sigma: float, prediction_type: str) -> tuple[float, float]:
    """x0 in sigmas, of a sample that is x0 + sigma * noise."""
    if prediction_type == "epsilon":
        return 1.0, -sigma
    if prediction_type == "v_prediction":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5
    return 0.0, 1.0
