"""A checkpoint's scheduler configuration -> plan: DDIM by formula, multistep samplers by probing.

A multistep sampler (DPM-Solver++, PNDM) remembers earlier outputs, but is linear in them: the
scheduler of diffusers is run once on unit vectors at export, and on random numbers as a check.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.errors import ScheduleError, TiueError, UsageError, first_line
from tiue_export.sampling.ddim import ddim_settings
from tiue_export.sampling.key_step_options import FasterOptions, ddim_plan, planned
from tiue_export.sampling.key_step_plan import (
    check_scheduler,
    ddim_trajectory,
    injection_from,
)
from tiue_export.sampling.plan import Injection, Plan
from tiue_export.sampling.trajectory import Trajectory, Weights, trace

_CLASSES = {
    "ddim": DDIMScheduler,
    "dpmpp": DPMSolverMultistepScheduler,
    "pndm": PNDMScheduler,
}
# diffusers casts DPM-Solver's samples to float32 at every step.
_LINEAR_WITHIN = 1e-4


def plan_from_config(config: Mapping[str, Any], options: FasterOptions) -> Plan:
    """The plan of a checkpoint's scheduler_config.json.

    Raises `ScheduleError` for a sampler that is stochastic or scales its input, `UsageError` for
    key steps that do not fit.
    """
    if options.scheduler == "ddim":
        return ddim_plan(config, options)
    injection = injection_from(options.inject)
    trajectory = trajectory_of(config, options.scheduler, options.asked_steps, injection)
    return planned(
        options,
        trajectory,
        prediction_type=str(ddim_settings(config)["prediction_type"]),
        timestep_spacing=_spacing(config, options.scheduler),
    )


def trajectory_of(
    config: Mapping[str, Any], scheduler: str, steps: int, injection: Injection | None = None
) -> Trajectory:
    """Every sample of the sampler as a combination of noise and outputs."""
    check_scheduler(scheduler)
    if scheduler == "ddim":
        return ddim_trajectory(config, steps, injection)
    if not 2 <= steps <= int(ddim_settings(config)["num_train_timesteps"]):
        raise UsageError(f"--steps is {steps}; expected 2 or more for {scheduler}")
    with _understood(scheduler):
        trajectory = _probe(config, scheduler, steps, injection)
        _check_linear(config, scheduler, steps, trajectory, injection)
    return trajectory


def diffusers_scheduler(config: Mapping[str, Any], scheduler: str, steps: int) -> Any:
    """diffusers' own scheduler as `Scheduler.from_config(config)` makes it, its timesteps set."""
    settings = ddim_arguments(config) if scheduler == "ddim" else dict(config)
    if scheduler == "pndm":
        # Its other start, four Runge-Kutta steps, takes a dozen calls that no one means by 50.
        settings |= {"skip_prk_steps": True}
    with quiet_libraries():
        made: Any = _CLASSES[scheduler].from_config(settings)
    if scheduler == "dpmpp":
        kind = str(made.config.algorithm_type)
        if kind.startswith("sde"):
            raise ScheduleError(
                f"the scheduler has algorithm_type {kind}, which draws fresh noise at every step",
                'Set "algorithm_type": "dpmsolver++" in scheduler_config.json.',
            )
    made.set_timesteps(steps)
    return made


def ddim_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """DDIMScheduler's arguments for a configuration that any scheduler class saved.

    `DDIMScheduler.from_config` would take its own defaults (clipping!) for keys that a PNDM
    configuration never has.
    """
    known = inspect.signature(DDIMScheduler.__init__).parameters
    return {key: value for key, value in ddim_settings(config).items() if key in known}


def _spacing(config: Mapping[str, Any], scheduler: str) -> str:
    with quiet_libraries(), _understood(scheduler):
        return str(_CLASSES[scheduler].from_config(dict(config)).config.timestep_spacing)


@contextmanager
def _understood(scheduler: str) -> Iterator[None]:
    """diffusers takes a configuration unchecked and fails where a value is used."""
    try:
        yield
    except TiueError:
        raise
    except Exception as error:
        raise ScheduleError(
            f"the scheduler configuration makes no {_CLASSES[scheduler].__name__}: "
            f"{first_line(error)}",
            "Restore the model's scheduler_config.json, or use --scheduler ddim.",
        ) from error


def _probe(
    config: Mapping[str, Any], scheduler: str, steps: int, injection: Injection | None
) -> Trajectory:
    made = diffusers_scheduler(config, scheduler, steps)
    timesteps = [int(t) for t in made.timesteps]

    def step(k: int, sample: Weights, output: Weights) -> Weights:
        tensors = torch.from_numpy(output), made.timesteps[k], torch.from_numpy(sample)
        stepped: Weights = made.step(*tensors).prev_sample.numpy()
        return stepped

    return trace(timesteps, step, injection)


def _check_linear(
    config: Mapping[str, Any],
    scheduler: str,
    steps: int,
    trajectory: Trajectory,
    injection: Injection | None,
) -> None:
    """The scheduler on random numbers against the probed combination: settings may break it."""
    made = diffusers_scheduler(config, scheduler, steps)
    random = np.random.RandomState(0).standard_normal((len(trajectory.timesteps) + 1, 64))
    sample = torch.from_numpy(random[0])
    for k, timestep in enumerate(made.timesteps):
        entering = torch.from_numpy(trajectory.entering[k] * random[0])
        sample = made.step(torch.from_numpy(random[k + 1]), timestep, sample + entering).prev_sample
    expected = trajectory.weights[-1] @ random
    error = float(np.abs(sample.numpy() - expected).max() / np.abs(expected).max())
    if not error < _LINEAR_WITHIN:
        raise ScheduleError(
            f"{type(made).__name__} with this configuration is not linear in its outputs "
            f"(relative error {error:.1e}); a plan needs constant coefficients",
            "Use --scheduler ddim, or remove clipping and thresholding from scheduler_config.json.",
        )
