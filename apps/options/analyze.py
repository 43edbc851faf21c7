"""The options of `tiue-export analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import (
    CheckpointOptions,
    FamilyOptions,
    LoraOptions,
    PartOptions,
    SamplerOptions,
)
from .graphs import SizeOptions
from .group import option
from .output import WriteOptions


@dataclass(frozen=True)
class AnalyzeRequest(
    WriteOptions,
    SizeOptions,
    SamplerOptions,
    LoraOptions,
    FamilyOptions,
    PartOptions,
    CheckpointOptions,
):
    """What is measured; `count` prompts are, and `check` more judge the lists."""

    panel = "Analysis"
    out: Path = option(Path("analysis"), "Folder for numbers and pictures.")
    prompts: Path | None = option(None, "Text file, one a line \\[default: ours].")
    count: int = option(4, "Prompts to measure.")
    check: int = option(2, "More prompts, to judge the lists by.")
    steps: int | None = option(None, "Steps of the sampler.")
    reach: int | None = option(None, "Longest group to measure \\[default: any].")
    budget: float | None = option(None, "Share of plain sampling's operations, such as 0.7.")
