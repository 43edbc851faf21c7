"""`tiue-export calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import WriteOptions
from ..options.runtime import DeviceOptions, RuntimeName


@dataclass(frozen=True)
class CalibrateRequest(WriteOptions, DeviceOptions, RuntimeName, BundleOptions):
    """The prompts that are captured, and where they go."""

    panel = "Calibration"
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write \\[default: NAME-calibration].")
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Text, TSV, JSONL or parquet \\[default: a list of ours]."),
    ] = None
    column: Annotated[
        str | None, typer.Option("--column", help="Field of --prompts \\[default: prompt, text].")
    ] = None
    count: Annotated[
        int | None, typer.Option("--count", help="Prompts to take \\[default: 64].")
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Prompt i uses seed + i.")] = 0
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the size, write nothing.")] = (
        False
    )


@command
def calibrate(request: CalibrateRequest) -> None:
    """Capture what real prompts feed the UNet, for `quantize`. Run the same line again to resume.

    Example:  tiue-export calibrate fox --prompts prompts.txt --out fox-calibration
    """
    from ..calibrate import run

    run(request)
