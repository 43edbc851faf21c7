"""What a user chooses for Faster Diffusion -> plan, where no scheduler library is needed: DDIM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tiue_export.errors import UsageError
from tiue_export.sampling.ddim import ddim_settings
from tiue_export.sampling.key_step_plan import (
    DEFAULT_STEPS,
    Trajectory,
    check_scheduler,
    ddim_trajectory,
    injection_from,
    key_steps_from,
    make_plan,
)
from tiue_export.sampling.plan import DEFAULT_GUIDANCE, Plan, check_decoder_rows


@dataclass(frozen=True)
class FasterOptions:
    """What the user chose for Faster Diffusion; `steps` None is the usual number of the sampler.

    `key_steps` and `inject` are spelled as on the command line; `key_steps` may also be numbers.
    """

    scheduler: str = "ddim"
    steps: int | None = None
    key_steps: str | tuple[int, ...] = "nonuniform"
    inject: str = "on"
    guidance: float = DEFAULT_GUIDANCE
    max_decoder_rows: int | None = None
    chosen_by: str = ""

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
    trajectory = ddim_trajectory(config, options.asked_steps, injection_from(options.inject))
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
    count = len(trajectory.timesteps)
    return make_plan(
        options.scheduler,
        trajectory,
        key_steps_from(chosen, count) if isinstance(chosen, str) else chosen,
        steps=options.asked_steps,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        guidance=options.guidance,
        injection=injection_from(options.inject),
        max_decoder_rows=options.max_decoder_rows,
        chosen_by=options.chosen_by or (chosen if isinstance(chosen, str) else "list"),
    )


@dataclass(frozen=True)
class PlanChange:
    """What shall differ from a bundle's own plan; None leaves it as it is.

    The graphs take any timesteps and any number of rows, so a plan can be changed when drawing.
    """

    steps: int | None = None
    key_steps: str | tuple[int, ...] | None = None
    inject: str | None = None
    max_decoder_rows: int | None = None


def changed_plan(config: Mapping[str, Any], plan: Plan, change: PlanChange) -> Plan:
    """Another plan for the graphs of a bundle, whose scheduler_config.json is `config`.

    Raises `UsageError` where the plan's sampler is not DDIM: its coefficients come from diffusers,
    which a device need not have. Fewer decoder rows at a time are possible with any.
    """
    check_decoder_rows(change.max_decoder_rows)
    if change.max_decoder_rows is not None:
        plan = replace(plan, max_decoder_rows=change.max_decoder_rows)
    if change == PlanChange(max_decoder_rows=change.max_decoder_rows):
        return plan
    if plan.scheduler != "ddim":
        raise UsageError(
            f"the bundle draws by {plan.scheduler}, whose coefficients were found at its export: "
            "steps, key steps and injection are fixed",
            "Export again with the options wanted; with --scheduler ddim they stay open.",
        )
    options = FasterOptions(
        steps=plan.steps if change.steps is None else change.steps,
        key_steps=_key_steps(plan, change),
        inject=change.inject or ("off" if plan.injection is None else plan.injection.placement),
        guidance=DEFAULT_GUIDANCE if plan.guidance is None else plan.guidance,
        max_decoder_rows=plan.max_decoder_rows,
        chosen_by=plan.chosen_by if change.key_steps is None else "",
    )
    return ddim_plan(config, options)


def _key_steps(plan: Plan, change: PlanChange) -> str | tuple[int, ...]:
    if change.key_steps == "auto":
        raise UsageError(
            "--key-steps auto measures a checkpoint; a bundle has none",
            "Give nonuniform, uniform:N, or the list that `analyze` chose.",
        )
    if change.key_steps is not None:
        return change.key_steps
    if change.steps is None or change.steps == plan.steps:
        return plan.key_steps
    if plan.chosen_by == "nonuniform" or plan.chosen_by.startswith("uniform:"):
        return plan.chosen_by
    listed = ",".join(map(str, plan.key_steps))
    raise UsageError(
        f"the bundle's key steps {listed} were chosen for {plan.steps} steps, "
        f"not for {change.steps}",
        "Add --key-steps nonuniform, uniform:N or a list.",
    )
