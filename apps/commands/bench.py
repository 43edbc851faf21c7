"""`tiue-export bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.checkpoint import PartOptions
from ..options.graphs import SizeOptions
from ..options.group import command
from ..options.output import JsonOptions
from ..options.runtime import ThreadOptions


@dataclass(frozen=True)
class BenchRequest(JsonOptions, ThreadOptions, SizeOptions, PartOptions):
    """What is timed, and how; lists hold what was given between commas too."""

    panel = "Measurement"
    bundles: Annotated[
        tuple[Path, ...], typer.Argument(help="Bundle folders.", show_default=False)
    ] = ()
    runtime: Annotated[
        tuple[str, ...],
        typer.Option("--runtime", help="ort, openvino, trt, torch \\[default: all that can run]."),
    ] = ()
    precision: Annotated[
        tuple[str, ...],
        typer.Option("--precision", help="For openvino: fp32, bf16 \\[default: all this CPU has]."),
    ] = ()
    contender: Annotated[
        tuple[str, ...],
        typer.Option(
            "--contenders",
            help="bundles, official, torch-bf16, torch-compile, one-step, four-step, fifty-step, "
            "rows-8, sd-cpp, METHOD/RUNTIME/PRECISION or all; all but bundles need --ckpt.",
        ),
    ] = ()
    ratio_to: Annotated[
        tuple[str, ...],
        typer.Option(
            "--ratio-to",
            help="Contender to divide by, or a method: in each one's runtime and precision "
            "\\[default: the first].",
        ),
    ] = ()
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="The same weights, for contenders in PyTorch.")
    ] = None
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each contender.")] = 5
    runs: Annotated[int, typer.Option("--runs", help="Timed runs a turn.")] = 3
    warmup: Annotated[int, typer.Option("--warmup", help="Untimed runs before them.")] = 1
    unet_only: Annotated[
        bool, typer.Option("--unet-only/--vae-too", help="Leave out text encoder and VAE.")
    ] = False
    reload: Annotated[
        bool, typer.Option("--reload", help="One process at a time: least memory, slower.")
    ] = False
    peak: Annotated[
        tuple[str, ...],
        typer.Option("--peak", help="bf16=1.1: TFLOP/s of this machine \\[default: measured]."),
    ] = ()
    no_peak: Annotated[bool, typer.Option("--no-peak", help="Do not measure the peak.")] = False
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder that keeps graphs made for measuring."),
    ] = None
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for one turn.")] = 3600.0
    out: Annotated[Path | None, typer.Option("--out", help="Record to write (.json).")] = None
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Table to write.")] = None
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture to write (.png).")] = None
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two records, before and now, instead of measuring."),
    ] = None
    fail_if_slower: Annotated[
        str | None,
        typer.Option("--fail-if-slower", help="5%: exit code 11 if anything got slower by more."),
    ] = None
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, auto.")] = "cpu"

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Every runtime that was named."""
        return _listed(self.runtime)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Every precision that was named."""
        return _listed(self.precision)

    @property
    def contenders(self) -> tuple[str, ...]:
        """Every contender that was named."""
        return _listed(self.contender)

    @property
    def ratios_to(self) -> tuple[str, ...]:
        """Everything to divide by."""
        return _listed(self.ratio_to)

    @property
    def peaks(self) -> tuple[str, ...]:
        """Every peak that was given."""
        return _listed(self.peak)


def _listed(values: tuple[str, ...]) -> tuple[str, ...]:
    """Options that may be repeated, or hold several values between commas."""
    return tuple(part for value in values for part in value.split(",") if part)


@command
def bench(request: BenchRequest) -> None:
    """Measure latency and memory side by side: each contender in its own process, in turn.

    Lists may be given between commas.

    Example:  tiue-export bench fox --ckpt student.safetensors --base sd21-base/ --out now.json

    Example:  tiue-export bench old new --unet-only --fail-if-slower 5%

    Example:  tiue-export bench --compare before.json now.json --fail-if-slower 5%
    """
    from ..bench import run

    run(request)
