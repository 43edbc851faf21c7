"""What a user chooses for Faster Diffusion -> plan, where no scheduler library is needed: DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiue_export.sampling.ddim import ddim_settings
from tiue_export.sampling.key_step_plan import (
    DEFAULT_STEPS,
    check_scheduler,
    ddim_trajectory,
    injection_from,
    key_steps_from,
    make_plan,
)
from tiue_export.sampling.plan import DEFAULT_GUIDANCE, Plan
from tiue_export.sampling.strength import first_step
from tiue_export.sampling.trajectory import Trajectory, key_steps_after


@dataclass(frozen=True)
class FasterOptions:
    """What the user chose for Faster Diffusion; `steps` None is the usual number of the sampler.

    `key_steps` and `inject` are spelled as on the command line; `key_steps` may also be numbers.
    `strength`: the share of the noise to start with, of a drawing that starts from a picture.
    """

    scheduler: str = "ddim"
    steps: int | None = None
    key_steps: str | tuple[int, ...] = "nonuniform"
    inject: str = "on"
    guidance: float = DEFAULT_GUIDANCE
    max_decoder_rows: int | None = None
    chosen_by: str = ""
    strength: float | None = None

    @property
    def asked_steps(self) -> int:
        """The steps asked for, or the sampler's usual number."""
        check_scheduler(self.scheduler)
        return DEFAULT_STEPS[self.scheduler] if self.steps is None else self.steps


def ddim_plan(config: Mapping[str, Any], options: FasterOptions) -> Plan:
    """The plan of a checkpoint's scheduler_config.json for DDIM.

    Raises `ScheduleError` for a configuration without a closed formula, `UsageError` for key steps
    that do not fit.
    """
    steps, injection = options.asked_steps, injection_from(options.inject)
    first = 0 if options.strength is None else first_step(steps, options.strength)
    trajectory = ddim_trajectory(config, steps, injection, first)
    settings = ddim_settings(config)
    return planned(
        options,
        trajectory,
        prediction_type=str(settings["prediction_type"]),
        timestep_spacing=str(settings["timestep_spacing"]),
    )


def planned(
    options: FasterOptions, trajectory: Trajectory, *, prediction_type: str, timestep_spacing: str
) -> Plan:
    """A sampler's trajectory, with the injection already in it, cut at the chosen key steps."""
    chosen = options.key_steps
    first = options.asked_steps - len(trajectory.timesteps) if options.strength is not None else 0
    count = first + len(trajectory.timesteps)
    keys = key_steps_from(chosen, count) if isinstance(chosen, str) else chosen
    return make_plan(
        options.scheduler,
        trajectory,
        key_steps_after(first, keys),
        steps=options.asked_steps,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        guidance=options.guidance,
        injection=injection_from(options.inject),
        max_decoder_rows=options.max_decoder_rows,
        chosen_by=options.chosen_by or (chosen if isinstance(chosen, str) else "list"),
    )
