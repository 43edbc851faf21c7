"""Few-step students: SD-Turbo, LCM, Hyper-SD and the others of the recipes, one pass a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tiue_export.errors import ScheduleError, UsageError
from tiue_export.methods.method import AUTO, SamplingOptions
from tiue_export.methods.recognition import recipe_of
from tiue_export.sampling.few_step import (
    METHOD,
    FewStepOptions,
    checked_steps,
    few_step_plan,
)
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.recipes import EMBEDDED, Recipe, recipe_named, recipes
from tiue_export.student.load import CheckpointFacts


@dataclass(frozen=True)
class FewStep:
    """The recipe is the one that was named, else the one the checkpoint tells."""

    name: str = METHOD
    summary: str = "few-step students such as SD-Turbo, LCM and Hyper-SD"
    takes: tuple[str, ...] = (
        "steps",
        "allow_other_steps",
        "recipe",
        "guidance",
        "key_steps",
        "eta",
        "max_decoder_rows",
    )
    features: frozenset[str] = frozenset()
    takes_controlnet: bool = False

    def check(self, options: SamplingOptions) -> None:
        """Refuse an unknown recipe, steps that it is not for, and key steps to be measured."""
        if options.key_steps == AUTO:
            raise UsageError(
                f"--key-steps {AUTO} measures ordinary models; of few steps there is little to "
                "choose",
                "Give them, such as --key-steps 0,2",
            )
        if options.recipe is not None:
            _check_steps(options.recipe, options)

    def plan(self, checkpoint: CheckpointFacts, options: SamplingOptions) -> Plan:
        """Raises `ScheduleError` where nothing says which recipe, and for what it cannot be."""
        name = options.recipe or recipe_of(checkpoint)
        if name is None:
            raise ScheduleError(
                f"nothing in {checkpoint.name} says which few-step student it is",
                "Say which, --recipe NAME, out of: tiue-export recipes",
            )
        recipe = recipe_named(name)
        if checkpoint.recorded_steps is not None:
            raise ScheduleError(
                f"{checkpoint.name} is a TiUE student (it records K={checkpoint.recorded_steps})",
                "Leave --recipe and --method out.",
            )
        _check_base(recipe, checkpoint)
        embeds = checkpoint.guidance_width is not None
        if embeds and recipe.guidance != EMBEDDED:
            raise ScheduleError(
                f"the UNet of {checkpoint.name} takes a guidance embedding, for which recipe "
                f"{name} has no scale",
                "Type --recipe lcm.",
            )
        if recipe.guidance == EMBEDDED and not embeds and options.guidance is not None:
            raise UsageError(
                f"--guidance is {options.guidance:g}, but the UNet of {checkpoint.name} has no "
                f"guidance embedding, into which recipe {name} folds it",
                "Leave --guidance out: it is distilled in.",
            )
        _check_steps(name, options)
        given = {field: getattr(options, field) for field in options.given() if field != "recipe"}
        plan = few_step_plan(checkpoint.scheduler_config, recipe, FewStepOptions(**given))
        # An LCM distilled at one scale has no embedding to fold it into.
        return plan if embeds else replace(plan, embedded_guidance=None)


def _check_base(recipe: Recipe, checkpoint: CheckpointFacts) -> None:
    """Refuse a recipe whose numbers are of the other kind of model."""
    if recipe.is_for(checkpoint.is_sdxl):
        return
    kinds = ("Stable Diffusion 1.x and 2.x", "SDXL")
    fitting = [one.name for one in recipes().values() if one.is_for(checkpoint.is_sdxl)]
    raise ScheduleError(
        f"recipe {recipe.name} is for {kinds[not checkpoint.is_sdxl]}; {checkpoint.name} is a "
        f"model of {kinds[checkpoint.is_sdxl]}",
        f"Type --recipe NAME, one of {', '.join(fitting)}",
    )


def _check_steps(name: str, options: SamplingOptions) -> None:
    checked_steps(
        recipe_named(name),
        options.steps,
        options.allow_other_steps,
        or_else=", or add --allow-other-steps to take them all the same.",
    )
