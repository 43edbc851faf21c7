"""Commands that measure a checkpoint before its export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import (
    Base,
    Checkpoint,
    Family,
    Force,
    Guidance,
    Height,
    HoistInto,
    Json,
    Lora,
    SchedulerName,
    Steps,
    Vae,
    Width,
)

app = typer.Typer()


@app.command()
@explained
def audit(
    ckpt: Checkpoint,
    base: Base = None,
    vae: Vae = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Text file, one prompt a line \\[default: two of ours]."),
    ] = None,
    height: Height = None,
    width: Width = None,
    steps: Steps = None,
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Audit a K it was not trained for.")
    ] = False,
    family: Family = None,
    no_hoist: Annotated[bool, typer.Option("--no-hoist", help="Naive batched decoder.")] = False,
    hoist_into: HoistInto = "decoder",
    top: Annotated[int, typer.Option("--top", help="Operations to list for each graph.")] = 10,
    as_json: Json = False,
) -> None:
    """Show how near a student's values come to half precision's limit, and what must stay float32.

    Example:  tiue-export audit --ckpt student.safetensors --base sd21-base/ --prompts prompts.txt
    """
    from ..overflow_audit import AuditRequest, run

    run(
        AuditRequest(
            ckpt=ckpt,
            base=base,
            vae=vae,
            prompts=prompts,
            height=height,
            width=width,
            steps=steps,
            allow_other_steps=allow_other_steps,
            family=family,
            hoist="none" if no_hoist else hoist_into,
            top=top,
            as_json=as_json,
        )
    )


@app.command()
@explained
def analyze(
    ckpt: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Folder for numbers and pictures.")] = Path(
        "analysis"
    ),
    base: Base = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, one a line \\[default: ours].")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Prompts to measure.")] = 4,
    check: Annotated[int, typer.Option("--check", help="More prompts, to judge the lists by.")] = 2,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the sampler.")] = None,
    scheduler: SchedulerName = None,
    guidance: Guidance = None,
    reach: Annotated[
        int | None, typer.Option("--reach", help="Longest group to measure \\[default: any].")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Share of plain sampling's operations, such as 0.7."),
    ] = None,
    lora: Lora = None,
    height: Height = None,
    width: Width = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure which steps of a model need its encoder, and choose key steps for Faster Diffusion.

    Run the same line again to resume, or with another --budget to choose anew.

    Example:  tiue-export analyze --ckpt sd21-base/ --steps 50 --budget 0.7 --out analysis
    """
    from ..analyze import AnalyzeRequest, run

    run(
        AnalyzeRequest(
            ckpt=ckpt,
            out=out,
            base=base,
            prompts=prompts,
            count=count,
            check=check,
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            reach=reach,
            budget=budget,
            lora=tuple(lora or ()),
            height=height,
            width=width,
            force=force,
            as_json=as_json,
        )
    )
