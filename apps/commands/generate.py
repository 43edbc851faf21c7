"""`tiue-export generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.bundle import BundleOptions
from ..options.group import OptionGroup, command
from ..options.runtime import ReferenceOptions, RuntimeOrAutoChoice


@dataclass(frozen=True)
class PromptOptions(BundleOptions):
    """What to draw, and from which noise."""

    panel = "Pictures"
    prompts: Annotated[
        tuple[str, ...],
        typer.Argument(metavar="PROMPTS", help="One or more.", show_default=False),
    ] = ()
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="One prompt a line; .tsv, .jsonl or .parquet: in bulk."),
    ] = None
    seed: Annotated[
        int | None, typer.Option("--seed", help="Picture i uses seed + i \\[default: 0].")
    ] = None
    count: Annotated[int, typer.Option("--count", help="Pictures per prompt.")] = 1
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Initial noise as .npy, instead of a seed.")
    ] = None
    negative: Annotated[
        str | None, typer.Option("--negative", help="faster: what the picture shall not show.")
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="faster: scale, 1 is none \\[default: the bundle's]."),
    ] = None
    control: Annotated[
        Path | None, typer.Option("--control", help="Picture a ControlNet follows (edges, depth).")
    ] = None
    control_scale: Annotated[
        float | None, typer.Option("--control-scale", help="How strongly \\[default: 1].")
    ] = None


@dataclass(frozen=True)
class PlanOptions(OptionGroup):
    """Another plan for the graphs of a model in a loop; None leaves the bundle's."""

    panel = "Another sampler plan (faster)"
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the sampler \\[default: the bundle's].")
    ] = None
    key_steps: Annotated[
        str | None,
        typer.Option(
            "--key-steps",
            help="nonuniform, uniform:N or 0,1,2,...; uniform:1 is ordinary sampling.",
        ),
    ] = None
    inject: Annotated[
        str | None, typer.Option("--inject", help="Prior noise: off, on, parallel, sequential.")
    ] = None
    max_decoder_rows: Annotated[
        int | None,
        typer.Option("--max-decoder-rows", help="Rows of one decoder run; less memory."),
    ] = None


@dataclass(frozen=True)
class PictureOutput(OptionGroup):
    """Where pictures go and how they are told."""

    panel = "Output"
    out: Annotated[
        Path, typer.Option("--out", help="Folder, or a .png path for a single picture.")
    ] = Path("pictures")
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", help="Also write one .png: prompts down, seeds across."),
    ] = None
    time_stages: Annotated[bool, typer.Option("--time", help="Print the time of each stage.")] = (
        False
    )
    force: Annotated[bool, typer.Option("--force", help="Replace existing output.")] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False


@dataclass(frozen=True)
class BulkOptions(OptionGroup):
    """What only a run over a table of prompts has; None where not given."""

    panel = "Many pictures (--prompts)"
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="png (a folder) or tar (WebDataset) \\[default: png]."),
    ] = None
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes that draw \\[default: 1].")
    ] = None
    ray: Annotated[bool, typer.Option("--ray", help="Workers on a Ray cluster.")] = False
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="Pictures per .tar \\[default: 1000].")
    ] = None
    prompt_column: Annotated[
        str | None,
        typer.Option("--prompt-column", help="The table's column \\[default: prompt]."),
    ] = None


@dataclass(frozen=True)
class DrawOptions(PlanOptions, ReferenceOptions, RuntimeOrAutoChoice, PictureOutput, PromptOptions):
    """A request for pictures."""


@command
def generate(draw: DrawOptions, bulk: BulkOptions) -> None:
    """Draw pictures from a bundle: no torch needed.

    Example:  tiue-export generate fox "a red fox in the snow" --seed 7 --count 4

    Example:  tiue-export generate fox --prompts coco.tsv --format tar --workers 2 --out coco

    Example:  tiue-export generate teacher "a red fox" --steps 25 --key-steps uniform:1 --inject off
    """
    from ..draw.bulk.drawing_run import in_bulk
    from ..draw.bulk.drawing_run import run as draw_in_bulk
    from ..draw.generate import run

    if in_bulk(draw, bulk):
        draw_in_bulk(draw, bulk)
    else:
        run(draw)
