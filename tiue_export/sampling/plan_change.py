"""Another plan for a bundle's graphs when drawing, by numbers alone: no scheduler library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tiue_export.errors import UsageError
from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
from tiue_export.sampling.key_step_options import FasterOptions, ddim_plan
from tiue_export.sampling.plan import DEFAULT_GUIDANCE, Plan, check_decoder_rows
from tiue_export.sampling.recipes import recipe_named
from tiue_export.sampling.strength import least_steps


@dataclass(frozen=True)
class PlanChange:
    """What shall differ from a bundle's own plan; None leaves it as it is.

    The graphs take any timesteps and any number of rows, so a plan can be changed when drawing.
    `strength` starts it later, for a drawing that starts from a picture.
    """

    steps: int | None = None
    key_steps: str | tuple[int, ...] | None = None
    inject: str | None = None
    max_decoder_rows: int | None = None
    strength: float | None = None


def changed_plan(config: Mapping[str, Any], plan: Plan, change: PlanChange) -> Plan:
    """Another plan for the graphs of a bundle, whose scheduler_config.json is `config`.

    Fewer decoder rows at a time are possible with any plan. Raises `UsageError` for the rest where
    the graphs hold it, or where its coefficients come from diffusers, which a device need not have.
    """
    check_decoder_rows(change.max_decoder_rows)
    if change.max_decoder_rows is not None:
        plan = replace(plan, max_decoder_rows=change.max_decoder_rows)
    if change == PlanChange(max_decoder_rows=change.max_decoder_rows):
        return plan
    if plan.one_pass:
        raise UsageError("the plan of one pass is held by the graphs", "Leave its changes out.")
    if plan.recipe:
        return _few_step_change(config, plan, change)
    if plan.scheduler != "ddim":
        raise UsageError(
            f"the bundle draws by {plan.scheduler}, whose coefficients were found at its export: "
            "steps, key steps and injection are fixed",
            "Export again with the options wanted; with --scheduler ddim they stay open.",
        )
    if change.strength is not None and change.inject not in (None, "off"):
        raise UsageError(
            f"--inject {change.inject} adds the noise that drawing began with; it begins with a "
            "picture here",
            "Leave --inject out.",
        )
    own = "off" if plan.injection is None else plan.injection.placement
    options = FasterOptions(
        steps=_steps(plan, change),
        key_steps=_key_steps(plan, change),
        # Injected is the initial noise, whose place the noised picture takes.
        inject="off" if change.strength is not None else change.inject or own,
        guidance=DEFAULT_GUIDANCE if plan.guidance is None else plan.guidance,
        max_decoder_rows=plan.max_decoder_rows,
        chosen_by=plan.chosen_by if change.key_steps is None else "",
        strength=change.strength,
    )
    return ddim_plan(config, options)


def _few_step_change(config: Mapping[str, Any], plan: Plan, change: PlanChange) -> Plan:
    if change.inject is not None:
        raise UsageError(
            f"--inject is for Faster Diffusion; recipe {plan.recipe} injects no noise",
            "Leave --inject out.",
        )
    recipe = recipe_named(plan.recipe)
    steps = _steps(plan, change)
    own_eta = plan.eta != recipe.eta_of(plan.steps)
    options = FewStepOptions(
        steps=steps,
        key_steps=_key_steps(plan, change),
        eta=plan.eta if own_eta else None,
        max_decoder_rows=plan.max_decoder_rows,
        # Of steps that begin at a picture the student takes some: no number is its own.
        allow_other_steps=steps == plan.steps or change.strength is not None,
        strength=change.strength,
    )
    changed = replace(
        few_step_plan(config, recipe, options),
        guidance=plan.guidance,
        embedded_guidance=plan.embedded_guidance,
    )
    # Graphs of several passes take their timestep, also that of a single one.
    changed = replace(changed, open_time=plan.open_time or changed.one_pass)
    if not plan.open_rows and any(one.rows > 1 for one in changed.passes):
        raise UsageError(
            "the bundle's decoder takes one step at a time, so every step runs the encoder",
            "Export again with the --key-steps wanted.",
        )
    return changed


def _steps(plan: Plan, change: PlanChange) -> int:
    """As asked, or the plan's own; more where of those none would be left after a picture."""
    if change.steps is not None:
        return change.steps
    recipe = recipe_named(plan.recipe) if plan.recipe else None
    fixed = recipe is not None and (recipe.rescales_steps or not recipe.chooses_steps)
    if change.strength is None or fixed:
        return plan.steps
    return max(plan.steps, least_steps(change.strength))


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
