"""The closed formula (Eq. 11 of the paper, corrected): latents = S * noise + sum_t E_t * output_t.

DDIM at eta 0 is linear in the sample and in the network's output, and the student's decoder
outputs all depend on the initial noise alone. Unrolling the K steps therefore leaves K + 1
constants. They are derived here in float64 from the student's own scheduler configuration.

The paper prints E_t = sqrt(a_0 / a_t) * (...) for t >= 2; unrolling its own Eq. 7-10 gives
E_t = sqrt(a_0) * (sqrt(1 / a_prev - 1) - sqrt(1 / a_t - 1)) for every t. The tests prove both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tiue_export.errors import ScheduleError, UsageError
from tiue_export.sampling.plan import Combination, Plan, single_pass
from tiue_export.sampling.trajectory import LinearStep

DEFAULT_STEPS = 4
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_NEUTRAL = {"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False}
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
# What a schedule can be at all; none was ever trained on more than a few thousand timesteps.
_RANGES = {
    "num_train_timesteps": (1, 100_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "steps_offset": (0, 100_000),
}
# What each diffusers class assumes for a key that its saved configuration lacks (diffusers 0.42
# constructor defaults). A key the class never had takes its neutral value: PNDM never clips.
# Classes without set_alpha_to_one leave the last step open, so the key must be in the file.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    },
    "PNDMScheduler": {
        "set_alpha_to_one": False,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    },
    "DDPMScheduler": {"clip_sample": True, "steps_offset": 0, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {"steps_offset": 0, "timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"steps_offset": 0, "timestep_spacing": "linspace"},
}


def one_pass_plan(config: Mapping[str, Any], steps: int) -> Plan:
    """The plan of a TiUE student: all K rows in one pass, S and E_t in float64 (Eq. 11, corrected).

    `config` is the content of scheduler_config.json. Raises `ScheduleError` for anything that
    breaks the closed formula: clipping, thresholding, K=1 on a schedule that ends at t<=1, an
    unknown scheduler class.
    """
    settings = ddim_settings(config)
    listed = ddim_steps(config, steps)
    if steps == 1 and listed[0].timestep <= 1:
        raise ScheduleError(
            f"K=1 on a {settings['timestep_spacing']!r} schedule has the single timestep "
            f"{listed[0].timestep}, where the formula returns the input noise unchanged",
            "Use the K the student was trained for, usually --steps 4.",
        )
    noise, outputs = 1.0, np.zeros(steps)
    for row, step in enumerate(listed):
        noise *= step.kept
        outputs *= step.kept
        outputs[row] += step.added
    return single_pass(
        "tiue",
        steps,
        [step.timestep for step in listed],
        Combination(float(noise), tuple(float(weight) for weight in outputs)),
        str(settings["prediction_type"]),
        str(settings["timestep_spacing"]),
    )


def ddim_steps(config: Mapping[str, Any], steps: int) -> list[LinearStep]:
    """The steps of DDIM at eta 0 as diffusers takes them, float64; raises like `one_pass_plan`."""
    settings = ddim_settings(config)
    train_steps = int(settings["num_train_timesteps"])
    if not 1 <= steps <= train_steps:
        raise UsageError(f"--steps is {steps}; expected 1 to {train_steps}")
    alphas = alphas_cumprod(settings)
    final_alpha = 1.0 if settings["set_alpha_to_one"] else float(alphas[0])
    listed = []
    for timestep in _timesteps(settings, steps):
        # DDIM steps to t - 1000 // K whatever the next listed timestep is (diffusers
        # scheduling_ddim.py, `step`): for linspace the two differ.
        previous = timestep - train_steps // steps
        target = float(alphas[previous]) if previous >= 0 else final_alpha
        alpha = float(alphas[timestep])
        try:
            kept, added = ode_step(alpha, target, settings["prediction_type"])
        except ZeroDivisionError as error:
            raise ScheduleError(
                f"the scheduler's betas give alpha {alpha:g} at timestep {timestep}, where a "
                f"{settings['prediction_type']} prediction would be divided by zero"
            ) from error
        listed.append(LinearStep(timestep, kept, added))
    return listed


def alphas_cumprod(config: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Cumulative products of 1 - beta, float64, shape (num_train_timesteps,)."""
    settings = {**_COMMON, **_NEUTRAL, **config}
    count = int(settings["num_train_timesteps"])
    start, end = float(settings["beta_start"]), float(settings["beta_end"])
    kind = settings["beta_schedule"]
    if settings["trained_betas"] is not None:
        try:
            betas = np.asarray(settings["trained_betas"], dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ScheduleError(f"trained_betas are no list of numbers: {error}") from None
        if betas.shape != (count,):
            raise ScheduleError(f"trained_betas has shape {betas.shape}; expected ({count},)")
        if not ((betas >= 0) & (betas <= 1)).all():
            raise ScheduleError("trained_betas holds a number that is not from 0 to 1")
    elif kind == "linear":
        betas = np.linspace(start, end, count)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count) ** 2
    elif kind == "squaredcos_cap_v2":
        grid = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - grid[1:] / grid[:-1], 0.999)
    else:
        raise ScheduleError(
            f"beta_schedule is {kind!r}; expected linear, scaled_linear or squaredcos_cap_v2"
        )
    if settings["rescale_betas_zero_snr"]:
        # Lin et al. 2023 (arXiv 2305.08891), Algorithm 1: shift sqrt(alpha) so that it ends at 0.
        roots = np.sqrt(np.cumprod(1 - betas))
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        return np.asarray(roots**2, dtype=np.float64)
    return np.asarray(np.cumprod(1 - betas), dtype=np.float64)


def ddim_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything DDIM needs, with the defaults of the class that wrote the file.

    Raises `ScheduleError` for what breaks the closed formula.
    """
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name not in _CLASS_DEFAULTS:
        raise ScheduleError(
            f"the scheduler is {name}; a closed formula is known for configurations saved by "
            f"{', '.join(_CLASS_DEFAULTS)}",
            "Pass --base with the pipeline folder whose scheduler the student was distilled with.",
        )
    settings = {**_COMMON, **_NEUTRAL, **_CLASS_DEFAULTS[name], **config}
    if "set_alpha_to_one" not in settings:
        raise ScheduleError(
            f"the {name} configuration has no set_alpha_to_one, so the last step is undefined",
            'Add "set_alpha_to_one": false (Stable Diffusion 1.x and 2.x) to '
            "scheduler_config.json.",
        )
    for key, reason in (
        ("clip_sample", "clips every intermediate sample"),
        ("thresholding", "rescales every intermediate sample by its own quantile"),
    ):
        if settings[key]:
            raise ScheduleError(
                f"the scheduler has {key}={settings[key]}, which {reason}; the closed formula "
                "needs steps that are linear in the sample",
                f'Set "{key}": false in scheduler_config.json if the student was trained so.',
            )
    for key, (least, most) in _RANGES.items():
        value = settings[key]
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not least <= value <= most:  # NaN is in no range
            raise ScheduleError(
                f"the scheduler's {key} is {str(value)[:40]!r}; expected a number from {least:g} "
                f"to {most:g}"
            )
    if settings["prediction_type"] not in PREDICTION_TYPES:
        raise ScheduleError(
            f"prediction_type is {settings['prediction_type']!r}; "
            f"expected {', '.join(PREDICTION_TYPES)}"
        )
    if settings["rescale_betas_zero_snr"] and settings["prediction_type"] == "epsilon":
        raise ScheduleError(
            "rescale_betas_zero_snr makes alpha 0 at the last training step, where an epsilon "
            "prediction would be divided by zero; expected v_prediction or sample"
        )
    return settings


def _timesteps(settings: Mapping[str, Any], steps: int) -> list[int]:
    """Descending timesteps as diffusers' DDIMScheduler.set_timesteps computes them."""
    count = int(settings["num_train_timesteps"])
    spacing = settings["timestep_spacing"]
    listed: npt.NDArray[np.float64]
    if spacing == "leading":
        listed = np.arange(steps, dtype=np.float64)[::-1] * (count // steps)
        listed += int(settings["steps_offset"])
    elif spacing == "trailing":
        listed = np.round(np.arange(count, 0, -count / steps)) - 1
    elif spacing == "linspace":
        listed = np.linspace(0, count - 1, steps).round()[::-1]
    else:
        raise ScheduleError(
            f"timestep_spacing is {spacing!r}; expected leading, trailing or linspace"
        )
    timesteps = [int(t) for t in listed]
    if len(timesteps) != steps or not 0 <= timesteps[-1] <= timesteps[0] < count:
        raise ScheduleError(
            f"{spacing} spacing with steps_offset {settings['steps_offset']} gives timesteps "
            f"{timesteps[:3]}...; expected {steps} values below {count}"
        )
    return timesteps


def ode_step(alpha: float, target: float, prediction_type: str) -> tuple[float, float]:
    """A step along the ODE (Song et al. 2020, Eq. 12, eta 0): factors of sample and output.

    Raises `ZeroDivisionError` at an alpha where the prediction says nothing.
    """
    sigma, target_sigma = (1 - alpha) ** 0.5, (1 - target) ** 0.5
    root, target_root = alpha**0.5, target**0.5
    if prediction_type == "epsilon":
        return target_root / root, target_sigma - target_root * sigma / root
    if prediction_type == "v_prediction":
        return (
            target_root * root + target_sigma * sigma,
            target_sigma * root - target_root * sigma,
        )
    return target_sigma / sigma, target_root - target_sigma * root / sigma
