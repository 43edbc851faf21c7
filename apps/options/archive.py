"""The options of `tiue-export bundle pack` and `unpack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, argument, option


@dataclass(frozen=True)
class PackOptions(OptionGroup):
    """The archive to write, and for whom."""

    panel = "Output"
    out: Path | None = option(None, "Archive to write \\[default: NAME.tar].")
    runtime: str | None = option(
        None, "Only what it needs: ort, trt, rtx, openvino, coreml, coreai \\[default: all]."
    )


@dataclass(frozen=True)
class UnpackOptions(OptionGroup):
    """The archive to read, and where it goes."""

    panel = "Output"
    archive: Path = argument(..., "Archive of bundle pack.")
    out: Path | None = option(None, "Folder to write \\[default: the archive's name].")
