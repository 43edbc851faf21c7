"""`tiue-export distill`: train a student from a configuration file; resume where it stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tiue_export.registry.packages import TRAIN_NEEDS, require
from tiue_export.system.command_line import command_line

from .report.tables import console, print_json


def run(
    file: Path | None, overrides: Mapping[str, object], list_presets: bool, as_json: bool
) -> None:
    """Train, and print where the student lies and what to type next."""
    require("distillation", TRAIN_NEEDS, "train")
    from tiue_export.errors import UsageError
    from tiue_export.train.config import preset_names, read_config
    from tiue_export.train.distill import distill

    if list_presets:
        print_json(list(preset_names())) if as_json else console.print("\n".join(preset_names()))
        return
    if file is None:
        raise UsageError(
            "no configuration was given",
            "tiue-export distill CONFIG.toml; --presets lists what a file can start from.",
        )
    config = read_config(file, overrides)
    stderr = Console(stderr=True)
    student = distill(config, lambda stage: stderr.print(f"[dim]{escape(stage)} ...[/]"))
    # Set by `accelerate launch`: one of several processes speaks for all.
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json({"student": str(student), "run": config.out, "iterations": config.iterations})
        return
    console.print(f"[bold green]Trained.[/] {escape(str(student))}")
    console.print(f"  {command_line('onnx', '--ckpt', student)}", markup=False, highlight=False)
    console.print(f"  tensorboard --logdir {config.out}", markup=False, highlight=False)
