"""The options of `tiue-export trt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoint import SourceOptions
from .graphs import EngineBatchOptions, ExportRequest
from .group import OptionGroup, option


@dataclass(frozen=True)
class EngineSource(SourceOptions):
    """The same; engines are built from a bundle's ONNX graphs, on a device without torch."""

    bundle: Path | None = option(None, "Bundle to add engines to; needs no torch.")


@dataclass(frozen=True)
class EngineOptions(OptionGroup):
    """How engines are built, and for whom.

    `sm` lists compute capabilities without the point, "86,89".
    """

    panel = "Engines"
    flavor: str = option(
        "auto", "tensorrt (Jetson, servers; on the device), rtx, or what is installed."
    )
    sm: str | None = option(
        None, "rtx: GPUs to build for \\[default: this one, else Ampere and up]."
    )
    precision: str | None = option(
        None, "fp16, fp32, or int8 (quantized bundles) \\[default: as is]."
    )
    optimization_level: int = option(3, "0 to 5: build time against speed.")
    workspace_mb: int = option(0, "Builder's scratch memory; 0: what is free.")
    version_compatible: bool = option(False, "Engines for newer TensorRTs too.")
    hardware_compatible: bool = option(False, "Engines for any Ampere or newer GPU.")
    refit: bool = option(False, "Engines whose weights can be swapped later.")
    rebuild: bool = option(False, "Build again what is valid already.")


@dataclass(frozen=True)
class RefitOptions(OptionGroup):
    """Other weights for engines that are there."""

    panel = "Engines"
    refit_from: str | None = option(None, "Student or bundle whose weights to put into engines.")


@dataclass(frozen=True)
class EngineExportRequest(EngineBatchOptions, ExportRequest):
    """An export whose batch may be a range, which engines are built for."""
