"""The options of `tiue-export calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle import BundleOptions
from .group import option
from .output import WriteOptions
from .runtime import DeviceOptions, RuntimeName


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
