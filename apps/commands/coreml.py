"""`tiue-export coreml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.checkpoint import StudentSourceOptions
from ..options.graphs import ExportRequest
from ..options.group import OptionGroup, command


@dataclass(frozen=True)
class CoremlForm(OptionGroup):
    """What packages are made for; None is the profile's own setting."""

    panel = "Core ML"
    profile: Annotated[
        str, typer.Option("--profile", help="mac-gpu, mac-ane, ipad or iphone; sets what follows.")
    ] = "mac-gpu"
    target: Annotated[
        str | None,
        typer.Option("--min-deployment-target", help="iOS16 to iOS18, or macOS13 to macOS15."),
    ] = None
    attention: Annotated[
        str | None, typer.Option("--attention", help="sdpa, split or split-chunked.")
    ] = None
    linear: Annotated[
        str | None,
        typer.Option("--linear", help="linear, or conv: channels first, for the Neural Engine."),
    ] = None
    decoder_batch: Annotated[
        int | None,
        typer.Option("--decoder-batch", help="Timesteps decoded at once: 1, 2 or 4; all exact."),
    ] = None
    precision: Annotated[str, typer.Option("--precision", help="fp16 or fp32.")] = "fp16"
    compress: Annotated[
        str | None,
        typer.Option(
            "--compress", help="none, palettize-8/-6/-4 (-grouped), int8, int4, w8a8 or recipe."
        ),
    ] = None
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", help="Choose bits per layer for latents this near, in dB."),
    ] = None
    target_mb: Annotated[
        float | None,
        typer.Option("--target-mb", help="Choose bits per layer for a UNet of this size."),
    ] = None
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Bits per layer from an earlier export.")
    ] = None
    calibration_prompts: Annotated[
        Path | None,
        typer.Option("--calibration-prompts", help="For w8a8: text file, one prompt a line."),
    ] = None
    compute_unit: Annotated[
        str | None,
        typer.Option(
            "--compute-unit", help="What to recommend: ALL, CPU_AND_GPU, CPU_AND_NE, CPU_ONLY."
        ),
    ] = None
    size: Annotated[
        tuple[str, ...],
        typer.Option("--size", help="HEIGHTxWIDTH in pixels; several make one package (iOS18)."),
    ] = ()
    swift_bundle: Annotated[
        bool,
        typer.Option(
            "--swift-bundle", help="Also write vocabulary, constants and compile.sh for Swift."
        ),
    ] = False


@command
def coreml(source: StudentSourceOptions, own: CoremlForm, export: ExportRequest) -> None:
    """Make Core ML packages for Mac, iPhone and iPad: on any machine, and proven on it.

    Each saved package is executed by an evaluator of its own and held against the student.

    Example:  tiue-export coreml --ckpt student.safetensors --base sd21-base/ --profile iphone

    Example:  tiue-export coreml --ckpt student.safetensors --bundle fox --target-mb 450

    Example:  tiue-export coreml --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from ..export.coreml import run

    run(source, own, export)
