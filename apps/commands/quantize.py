"""`tiue-export quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import WriteOptions
from ..options.runtime import MemoryOptions, PrecisionOptions, ThreadOptions


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(WriteOptions, MemoryOptions, ThreadOptions, PrecisionOptions, BundleOptions):
    """What is quantized, and how it is judged; None is the default of what it is passed to."""

    panel = "Quantization"
    calibration: Annotated[
        Path, typer.Option("--calibration", help="Folder that `calibrate` wrote.")
    ]
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write \\[default: NAME-KIND].")
    ] = None
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="w8a8, hybrid (linear layers: weights only), int8-weights, 4-bit "
            "\\[default: w8a8].",
        ),
    ] = None
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnx: Q/DQ for ort, trt, openvino; openvino: by NNCF."),
    ] = "onnx"
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", help="dB that the latents shall keep \\[default: 35]."),
    ] = None
    ranges: Annotated[
        str | None,
        typer.Option("--ranges", help="min-max, percentile or entropy \\[default: percentile]."),
    ] = None
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="In percent \\[default: 99.99].")
    ] = None
    smooth: Annotated[
        float | None,
        typer.Option("--smooth", help="SmoothQuant's alpha, folded exactly \\[default: 0.5]."),
    ] = None
    no_smooth: Annotated[bool, typer.Option("--no-smooth", help="Fold nothing.")] = False
    sensitivity: Annotated[
        str | None,
        typer.Option(
            "--sensitivity",
            help="Quantize alone: each layer, each block, or none \\[default: layer].",
        ),
    ] = None
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Replay this plan, edited or not.")
    ] = None
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write no bundle; see --save-plan.")
    ] = False
    save_plan: Annotated[
        Path | None, typer.Option("--save-plan", help="Write the plan here too (.json).")
    ] = None
    scales: Annotated[
        str, typer.Option("--scales", help="fp32: casts around Q/DQ in half graphs.")
    ] = "auto"
    held_out: Annotated[
        int | None, typer.Option("--held-out", help="Runs kept for judging \\[default: 4].")
    ] = None
    runtime: Annotated[str | None, typer.Option("--runtime", help="Judge on ort or openvino.")] = (
        None
    )
    device: Annotated[str, typer.Option("--device", help="Judge on cpu or cuda.")] = "cpu"
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Timed runs of each \\[default: 5].")
    ] = None
    any_speed: Annotated[
        bool, typer.Option("--any-speed", help="For another device: judge quality alone.")
    ] = False
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep a bundle below its gate.")
    ] = False
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Keep a bundle that is no gain here.")
    ] = False
    plots: Annotated[
        Path | None,
        typer.Option("--plots", help="Folder for two pictures; measures six sets more."),
    ] = None


@command
def quantize(request: QuantizeRequest) -> None:
    """Quantize the UNet where it is proven: close enough, and faster on this machine.

    Example:  tiue-export quantize fox --calibration fox-calibration --out fox-int8

    Example:  tiue-export quantize fox --calibration fox-calibration --backend openvino

    Example:  tiue-export quantize half --calibration fox-calibration --plan plan.json --any-speed
    """
    from ..quantize import run

    run(request)
