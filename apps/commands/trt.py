"""`tiue-export trt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.checkpoint import SourceOptions
from ..options.graphs import EngineBatchOptions, ExportRequest
from ..options.group import OptionGroup, command


@dataclass(frozen=True)
class EngineSource(SourceOptions):
    """The same; engines are built from a bundle's ONNX graphs, on a device without torch."""

    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle to add engines to; needs no torch.")
    ] = None


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """How engines are built, and for whom.

    `sm` lists compute capabilities without the point, "86,89".
    """

    panel = "Engines"
    flavor: Annotated[
        str,
        typer.Option(
            "--flavor", help="tensorrt (Jetson, servers; on the device), rtx, or what is installed."
        ),
    ] = "auto"
    sm: Annotated[
        str | None,
        typer.Option(
            "--sm", help="rtx: GPUs to build for \\[default: this one, else Ampere and up]."
        ),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="fp16, fp32, or int8 (quantized bundles) \\[default: as is]."
        ),
    ] = None
    optimization_level: Annotated[
        int, typer.Option("--optimization-level", help="0 to 5: build time against speed.")
    ] = 3
    workspace_mb: Annotated[
        int, typer.Option("--workspace-mb", help="Builder's scratch memory; 0: what is free.")
    ] = 0
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines for newer TensorRTs too.")
    ] = False
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Engines for any Ampere or newer GPU.")
    ] = False
    refit: Annotated[
        bool, typer.Option("--refit", help="Engines whose weights can be swapped later.")
    ] = False
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is valid already.")
    ] = False


@dataclass(frozen=True)
class RefitOptions(OptionGroup):
    """Other weights for engines that are there."""

    panel = "Engines"
    refit_from: Annotated[
        str | None,
        typer.Option("--refit-from", help="Student or bundle whose weights to put into engines."),
    ] = None


@dataclass(frozen=True)
class EngineExportRequest(EngineBatchOptions, ExportRequest):
    """An export whose batch may be a range, which engines are built for."""


@command
def trt(
    source: EngineSource, engine: EngineOptions, refit: RefitOptions, export: EngineExportRequest
) -> None:
    """Build TensorRT engines: on the device, or for RTX cards anywhere, without a GPU.

    Engines that are valid already are kept; precision is proven layer by layer.

    Example:  tiue-export trt --ckpt student.safetensors --base sd21-base/

    Example:  tiue-export trt --bundle fox --flavor rtx --sm 86,89,120

    Example:  tiue-export trt --ckpt sd21-base/ --method faster --max-decoder-rows 10 --out fox

    Example:  tiue-export trt --bundle fox --refit-from tuned.safetensors --out tuned
    """
    from ..export.refit import run as run_refit
    from ..export.trt import run

    if refit.refit_from is not None:
        run_refit(source, engine, refit.refit_from, export)
    else:
        run(source, engine, export)
