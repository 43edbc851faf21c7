"""`tiue-export calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.bundle import BundleOptions
from ..options.group import command, option
from ..options.output import WriteOptions
from ..options.runtime import DeviceOptions, RuntimeName


@dataclass(frozen=True)
class CalibrateRequest(WriteOptions, DeviceOptions, RuntimeName, BundleOptions):
    """The prompts that are captured, and where they go."""

    panel = "Calibration"
    out: Path | None = option(None, "Folder to write \\[default: NAME-calibration].")
    prompts: Path | None = option(None, "Text, TSV, JSONL or parquet \\[default: a list of ours].")
    column: str | None = option(None, "Field of --prompts \\[default: prompt, text].")
    count: int | None = option(None, "Prompts to take \\[default: 64].")
    seed: int = option(0, "Prompt i uses seed + i.")
    dry_run: bool = option(False, "Print the size, write nothing.")


@command
def calibrate(request: CalibrateRequest) -> None:
    """Capture what real prompts feed the UNet, for `quantize`. Run the same line again to resume.

    Example:  tiue-export calibrate fox --prompts prompts.txt --out fox-calibration
    """
    from ..calibrate import run

    run(request)
