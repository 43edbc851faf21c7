"""`tiue-export distill`."""

from __future__ import annotations

from ..options.distill import TrainingOptions
from ..options.group import command
from ..options.output import JsonOptions


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
