"""diffusers' own schedulers, stepped as its pipelines do: what a plan's numbers are held to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.methods.scheduler import diffusers_scheduler
from tiue_export.sampling.few_step import schedule_settings
from tiue_export.sampling.key_step_plan import SCHEDULERS
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.recipes import recipe_named
from tiue_export.specs import Array

# Rectified flow and a lone prediction of x0 have no scheduler there that is stepped like these.
_FEW_STEP: Mapping[str, Any] = MappingProxyType(
    {
        "lcm": LCMScheduler,
        "tcd": TCDScheduler,
        "euler": EulerDiscreteScheduler,
        "euler-ancestral": EulerAncestralDiscreteScheduler,
        "ddim": DDIMScheduler,
    }
)


def plan_scheduler(config: Mapping[str, Any], plan: Plan) -> Any | None:
    """diffusers' scheduler for a plan, its timesteps set; None where it has none."""
    if not plan.recipe:
        known = plan.scheduler in SCHEDULERS
        return diffusers_scheduler(config, plan.scheduler, plan.steps) if known else None
    if plan.scheduler not in _FEW_STEP:
        return None
    recipe = recipe_named(plan.recipe)
    settings = schedule_settings(config, recipe)
    with quiet_libraries():
        scheduler: Any = _FEW_STEP[plan.scheduler].from_config(
            {key: value for key, value in settings.items() if key != "_class_name"}
        )
        if plan.steps in recipe.timesteps:
            scheduler.set_timesteps(timesteps=list(recipe.timesteps[plan.steps]))
        else:
            scheduler.set_timesteps(plan.steps)
    return scheduler


# (sample as the scheduler scales it, timestep, number of the step) -> the network's output.
Network = Callable[[Tensor, Tensor, int], Tensor]


def diffusers_loop(scheduler: Any, plan: Plan, noises: Array, network: Network) -> Tensor:
    """The pipelines' loop of diffusers: noises (N, B, 4, H, W) -> latents (B, 4, H, W).

    Fresh noise is ours, in the order in which the scheduler draws it.
    """
    start, *fresh = (torch.from_numpy(noise) for noise in noises)
    extra = {"eta": plan.eta} if plan.scheduler == "tcd" else {}
    sample = start * scheduler.init_noise_sigma
    with _drawing(scheduler, fresh):
        for number, timestep in enumerate(scheduler.timesteps):
            if plan.injection is not None and int(timestep) / 1000 < plan.injection.below:
                sample = sample + plan.injection.strength * start
            scaled = scheduler.scale_model_input(sample, timestep)
            output = network(scaled, timestep, number)
            sample = scheduler.step(output, timestep, sample, **extra).prev_sample
    latents: Tensor = sample
    return latents


@contextmanager
def _drawing(scheduler: Any, fresh: list[Tensor]) -> Iterator[None]:
    """Let a scheduler draw these noises, then zeros: ancestral Euler draws one it weighs with 0.

    No scheduler takes its noise as an argument, but each draws it by one function of its module.
    """
    module = sys.modules[type(scheduler).__module__]
    own = getattr(module, "randn_tensor", None)
    if own is None:  # it draws none
        yield
        return
    waiting = iter(fresh)

    def given(shape: Any, *args: Any, dtype: torch.dtype, **others: Any) -> Tensor:
        return next(waiting, torch.zeros(shape)).to(dtype)

    vars(module)["randn_tensor"] = given
    try:
        yield
    finally:
        vars(module)["randn_tensor"] = own
