"""The options of `tiue-export generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle import BundleOptions
from .group import OptionGroup, argument, option
from .runtime import ReferenceOptions, RuntimeOrAutoChoice


@dataclass(frozen=True)
class PromptOptions(BundleOptions):
    """What to draw, and from which noise."""

    panel = "Pictures"
    prompts: tuple[str, ...] = argument((), "One or more.", metavar="PROMPTS")
    prompts_file: Path | None = option(
        None, "One prompt a line; .tsv, .csv, .jsonl or .parquet: in bulk.", "--prompts"
    )
    seed: int | None = option(None, "Picture i uses seed + i \\[default: 0].")
    count: int = option(1, "Pictures per prompt.")
    latents: Path | None = option(None, "Initial noise as .npy, instead of a seed.")
    negative: str | None = option(None, "faster: what the picture shall not show.")
    guidance: float | None = option(None, "faster: scale, 1 is none \\[default: the bundle's].")
    prompt_weights: bool = option(
        False, "Read (word:1.3), ((word)) and \\[word] as weights; else they are letters."
    )
    control: Path | None = option(None, "Picture a ControlNet follows (edges, depth).")
    control_scale: float | None = option(None, "How strongly \\[default: 1].")


@dataclass(frozen=True)
class StartOptions(OptionGroup):
    """A picture to start from, instead of noise alone."""

    panel = "From a picture (a bundle exported --with-vae-encoder)"
    image: Path | None = option(None, "Picture to start from; scaled and cut to the bundle's size.")
    mask: Path | None = option(None, "As large as --image: white is drawn anew, black stays.")
    strength: float | None = option(
        None,
        r"Share of the noise, above 0 to 1; a TiUE student has its own \[default: 0.8, with "
        "--mask 1].",
    )
    sampled: bool = option(
        False, "Its latents as the VAE's encoder spreads them, by the seed; else their mean."
    )


@dataclass(frozen=True)
class PlanOptions(OptionGroup):
    """Another plan for the graphs of a model in a loop; None leaves the bundle's."""

    panel = "Another sampler plan (faster)"
    steps: int | None = option(None, "Steps of the sampler \\[default: the bundle's].")
    key_steps: str | None = option(
        None, "nonuniform, uniform:N or 0,1,2,...; uniform:1 is ordinary sampling."
    )
    inject: str | None = option(None, "Prior noise: off, on, parallel, sequential.")
    max_decoder_rows: int | None = option(None, "Rows of one decoder run; less memory.")


@dataclass(frozen=True)
class PictureOutput(OptionGroup):
    """Where pictures go and how they are told."""

    panel = "Output"
    out: Path = option(Path("pictures"), "Folder, or a .png path for a single picture.")
    sheet: Path | None = option(None, "Also write one .png: prompts down, seeds across.")
    time_stages: bool = option(False, "Print the time of each stage.", "--time")
    force: bool = option(False, "Replace existing output.")
    as_json: bool = option(False, "Print one JSON object instead of tables.", "--json")


@dataclass(frozen=True)
class BulkOptions(OptionGroup):
    """What only a run over a table of prompts has; None where not given."""

    panel = "Many pictures (--prompts)"
    file_format: str | None = option(
        None, "png (a folder) or tar (WebDataset) \\[default: png].", "--format"
    )
    workers: int | None = option(None, "Processes that draw \\[default: 1].")
    ray: bool = option(False, "Workers on a Ray cluster.")
    shard_size: int | None = option(None, "Pictures per .tar \\[default: 1000].")
    prompt_column: str | None = option(None, "The table's column \\[default: prompt].")


@dataclass(frozen=True)
class DrawOptions(
    PlanOptions,
    StartOptions,
    ReferenceOptions,
    RuntimeOrAutoChoice,
    PictureOutput,
    PromptOptions,
):
    """A request for pictures."""
