"""What a checkpoint is by its own marks, where nobody says: which few-step student, or none.

A scheduler's class is what its authors sample it with: SD-Turbo is saved with Euler's, an LCM with
its own. What no mark tells (a LoRA merged into an ordinary model) is not guessed.
"""

from __future__ import annotations

from tiue_export.student.load import CheckpointFacts

_TRAILING = "trailing"
# (scheduler class, its timestep spacing or None for any) -> recipe, recipe of SDXL
_BY_SCHEDULER: tuple[tuple[str, str | None, str, str], ...] = (
    ("LCMScheduler", None, "lcm", "lcm"),
    ("TCDScheduler", None, "tcd", "tcd"),
    ("EulerDiscreteScheduler", _TRAILING, "sd-turbo", "lightning"),
    ("EulerAncestralDiscreteScheduler", _TRAILING, "euler-ancestral", "sdxl-turbo"),
)


def recipe_of(checkpoint: CheckpointFacts) -> str | None:
    """The name of the recipe that a checkpoint's marks tell; None where they tell none."""
    recognised = recognition(checkpoint)
    return None if recognised is None else recognised[0]


def recognition(checkpoint: CheckpointFacts) -> tuple[str, str] | None:
    """The recipe, and the mark that tells it, in words."""
    if checkpoint.recorded_steps is not None:
        return None
    if checkpoint.guidance_width is not None:
        return "lcm", "its guidance embedding"
    if not checkpoint.has_mid_block and checkpoint.vae_class == "AutoencoderTiny":
        return "sdxs", "its UNet without a middle block and its AutoencoderTiny"
    name = checkpoint.scheduler_config.get("_class_name")
    spacing = checkpoint.scheduler_config.get("timestep_spacing")
    for scheduler, wanted, recipe, of_sdxl in _BY_SCHEDULER:
        if name == scheduler and wanted in (None, spacing):
            with_spacing = f" with {spacing} timesteps" if wanted else ""
            chosen = of_sdxl if checkpoint.is_sdxl else recipe
            return chosen, f"its scheduler, {name}{with_spacing}"
    return None
