"""The command that trains a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import Json

app = typer.Typer()


@app.command()
@explained
def distill(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; see docs/training.md.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder \\[default: the file's `out`].")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", help="Stop after this many \\[default: the file's]."),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the presets a configuration can name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a TiUE student from a teacher. Run the same line again to resume.

    On several GPUs or machines, put `accelerate launch -m tiue_export` for `tiue-export`.

    Example:  tiue-export distill student.toml
    """
    from ..distill import run

    overrides = {"out": None if out is None else str(out), "iterations": iterations}
    given = {key: value for key, value in overrides.items() if value is not None}
    run(config, given, presets, as_json)
