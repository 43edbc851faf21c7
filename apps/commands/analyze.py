"""`tiue-export analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.checkpoint import (
    CheckpointOptions,
    FamilyOptions,
    LoraOptions,
    PartOptions,
    SamplerOptions,
)
from ..options.graphs import SizeOptions
from ..options.group import command, option
from ..options.output import WriteOptions


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


@command
def analyze(request: AnalyzeRequest) -> None:
    """Measure which steps of a model need its encoder, and choose key steps for Faster Diffusion.

    Run the same line again to resume, or with another --budget to choose anew.

    Example:  tiue-export analyze --ckpt sd21-base/ --steps 50 --budget 0.7 --out analysis
    """
    from ..analyze import run

    run(request)
