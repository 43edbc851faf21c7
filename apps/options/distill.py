"""The options of `tiue-export distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, argument, option


@dataclass(frozen=True)
class TrainingOptions(OptionGroup):
    """A configuration, and what differs from it."""

    panel = "Training"
    config: Path | None = argument(None, "TOML file; see docs/training.md.")
    out: Path | None = option(None, "Run folder \\[default: the file's `out`].")
    iterations: int | None = option(None, "Stop after this many \\[default: the file's].")
    presets: bool = option(False, "List the presets a configuration can name.")
