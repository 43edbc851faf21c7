"""TiUE: a distilled student draws in one pass, K decoder rows combined by a closed formula."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.errors import CheckpointError, ScheduleError, UsageError
from tiue_export.methods.method import SamplingOptions
from tiue_export.sampling.ddim import DEFAULT_STEPS, one_pass_plan
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.plan import Plan
from tiue_export.student.load import FAN_OUT_KEY, STEPS_KEY, CheckpointFacts

# What a TiUE student's scheduler_config.json can say.
_SCHEDULERS = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
_SPACING = "leading"


@dataclass(frozen=True)
class Tiue:
    """K is what the checkpoint records, else what was asked for, else 4."""

    name: str = "tiue"
    summary: str = "a distilled student, which draws in one pass"
    takes: tuple[str, ...] = ("steps", "allow_other_steps", "max_decoder_rows")
    features: frozenset[str] = frozenset()
    takes_controlnet: bool = False

    def check(self, options: SamplingOptions) -> None:
        """K is checked against the checkpoint, in `plan`."""

    def plan(self, checkpoint: CheckpointFacts, options: SamplingOptions) -> Plan:
        """Raises `ScheduleError` for a K that the student was not trained for."""
        steps = _steps(checkpoint.recorded_steps, options.steps, options.allow_other_steps)
        plan = one_pass_plan(checkpoint.scheduler_config, steps)
        recorded = checkpoint.recorded_fan_out
        if recorded is not None:
            plan = plan.parting_at(_fan_out(recorded))
        return plan.in_pieces(options.max_decoder_rows)


def check_assumed(checkpoint: CheckpointFacts) -> None:
    """Refuse to take a checkpoint for a TiUE student whose scheduler says that it is none.

    A student that records its K is one. Of others the scheduler alone tells: TiUE is distilled on
    DDIM's steps from t = 1 on; trailing ones are those of few-step students merged from adapters,
    which no other mark tells from ordinary models. Raises `ScheduleError`.
    """
    if checkpoint.recorded_steps is not None:
        return
    config = checkpoint.scheduler_config
    name = str(config.get("_class_name", _SCHEDULERS[0]))
    spacing = str(config.get("timestep_spacing", _SPACING))
    if name not in _SCHEDULERS or spacing != _SPACING:
        raise ScheduleError(
            f"{checkpoint.name} is no TiUE student by its scheduler, {name} with {spacing} "
            f"timesteps; expected {' or '.join(_SCHEDULERS)} with {_SPACING} ones",
            "Add --method faster for an ordinary model, --method tiue to take it for a student all "
            "the same, or --recipe NAME for a few-step student out of: tiue-export recipes",
        )


def _fan_out(recorded: object) -> FanOut:
    try:
        return FanOut.parse(str(recorded), FAN_OUT_KEY)
    except UsageError as error:
        raise CheckpointError(str(error)) from error


def _steps(recorded: object, wanted: int | None, allow_other: bool) -> int:
    if recorded is None:
        return DEFAULT_STEPS if wanted is None else wanted
    try:
        trained = int(str(recorded))
    except ValueError as error:
        raise CheckpointError(f"{STEPS_KEY} is {recorded!r}; expected a whole number") from error
    if wanted is not None and wanted != trained and not allow_other:
        raise ScheduleError(
            f"the student was trained for K={trained}, --steps asks for {wanted}; its decoder "
            "never saw those timesteps",
            f"Leave --steps out, or pass --allow-other-steps to export K={wanted} all the same.",
        )
    return trained if wanted is None else wanted
