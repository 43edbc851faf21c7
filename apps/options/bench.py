"""The options of `tiue-export bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import PartOptions
from .graphs import SizeOptions
from .group import argument, option
from .output import JsonOptions
from .runtime import ThreadOptions


@dataclass(frozen=True)
class BenchRequest(JsonOptions, ThreadOptions, SizeOptions, PartOptions):
    """What is timed, and how; lists hold what was given between commas too."""

    panel = "Measurement"
    bundles: tuple[Path, ...] = argument((), "Bundle folders.")
    runtimes: tuple[str, ...] = option(
        (), "ort, openvino, trt, torch \\[default: all that can run].", "--runtime"
    )
    precisions: tuple[str, ...] = option(
        (), "For openvino: fp32, bf16 \\[default: all this CPU has].", "--precision"
    )
    contenders: tuple[str, ...] = option(
        (),
        "bundles, official, torch-bf16, torch-compile, one-step, four-step, fifty-step, "
        "rows-8, sd-cpp, METHOD/RUNTIME/PRECISION or all; all but bundles need --ckpt.",
    )
    ratios_to: tuple[str, ...] = option(
        (),
        "Contender to divide by, or a method: in each one's runtime and precision "
        "\\[default: the first].",
        "--ratio-to",
    )
    ckpt: str | None = option(None, "The same weights, for contenders in PyTorch.")
    rounds: int = option(5, "Turns of each contender.")
    runs: int = option(3, "Timed runs a turn.")
    warmup: int = option(1, "Untimed runs before them.")
    unet_only: bool = option(False, "Leave out text encoder and VAE.", "--unet-only/--vae-too")
    reload: bool = option(False, "One process at a time: least memory, slower.")
    peaks: tuple[str, ...] = option(
        (), "bf16=1.1: TFLOP/s of this machine \\[default: measured].", "--peak"
    )
    no_peak: bool = option(False, "Do not measure the peak.")
    work: Path | None = option(None, "Folder that keeps graphs made for measuring.")
    timeout_s: float = option(3600.0, "Seconds for one turn.", "--timeout")
    out: Path | None = option(None, "Record to write (.json), after each round.")
    resume: bool = option(False, "Go on with the rounds that --out holds.")
    markdown: Path | None = option(None, "Table to write.")
    plot: Path | None = option(None, "Picture to write (.png).")
    compare: tuple[Path, Path] | None = option(
        None, "Two records, before and now, instead of measuring."
    )
    fail_if_slower: str | None = option(None, "5%: exit code 11 if anything got slower by more.")
    device: str = option("cpu", "cpu, cuda, auto.")
