"""`tiue-export distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.group import OptionGroup, argument, command, option
from ..options.output import JsonOptions


@dataclass(frozen=True)
class TrainingOptions(OptionGroup):
    """A configuration, and what differs from it."""

    panel = "Training"
    config: Path | None = argument(None, "TOML file; see docs/training.md.")
    out: Path | None = option(None, "Run folder \\[default: the file's `out`].")
    iterations: int | None = option(None, "Stop after this many \\[default: the file's].")
    presets: bool = option(False, "List the presets a configuration can name.")


@command
def distill(training: TrainingOptions, output: JsonOptions) -> None:
    """Train a TiUE student from a teacher. Run the same line again to resume.

    On several GPUs or machines, put `accelerate launch -m tiue_export` for `tiue-export`.

    Example:  tiue-export distill student.toml
    """
    from ..distill import run

    out = None if training.out is None else str(training.out)
    overrides = {"out": out, "iterations": training.iterations}
    chosen = {key: value for key, value in overrides.items() if value is not None}
    run(training.config, chosen, training.presets, output.as_json)
