"""`tiue-export analyze`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.checkpoint import (
    CheckpointOptions,
    FamilyOptions,
    LoraOptions,
    PartOptions,
    SamplerOptions,
)
from ..options.graphs import SizeOptions
from ..options.group import command
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
    out: Annotated[Path, typer.Option("--out", help="Folder for numbers and pictures.")] = Path(
        "analysis"
    )
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, one a line \\[default: ours].")
    ] = None
    count: Annotated[int, typer.Option("--count", help="Prompts to measure.")] = 4
    check: Annotated[int, typer.Option("--check", help="More prompts, to judge the lists by.")] = 2
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the sampler.")] = None
    reach: Annotated[
        int | None, typer.Option("--reach", help="Longest group to measure \\[default: any].")
    ] = None
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Share of plain sampling's operations, such as 0.7."),
    ] = None


@command
def analyze(request: AnalyzeRequest) -> None:
    """Measure which steps of a model need its encoder, and choose key steps for Faster Diffusion.

    Run the same line again to resume, or with another --budget to choose anew.

    Example:  tiue-export analyze --ckpt sd21-base/ --steps 50 --budget 0.7 --out analysis
    """
    from ..analyze import run

    run(request)
