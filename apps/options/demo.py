"""The options of `tiue-export demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class DemoOptions(OptionGroup):
    """Where the demo goes."""

    panel = "Output"
    out: Path = option(Path("demo"), "Folder for everything it makes.")
