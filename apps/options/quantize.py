"""The options of `tiue-export quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .bundle import BundleOptions
from .group import option
from .output import WriteOptions
from .runtime import MemoryOptions, PrecisionOptions, ThreadOptions


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(WriteOptions, MemoryOptions, ThreadOptions, PrecisionOptions, BundleOptions):
    """What is quantized, and how it is judged; None is the default of what it is passed to."""

    panel = "Quantization"
    calibration: Path = option(..., "Folder that `calibrate` wrote.")
    out: Path | None = option(None, "Bundle to write \\[default: NAME-KIND].")
    kind: str | None = option(
        None, "w8a8, hybrid (linear layers: weights only), int8-weights, 4-bit \\[default: w8a8]."
    )
    parts: str = option("unet", "Between commas: unet, vae, text (its weights).")
    backend: str = option("onnx", "onnx: Q/DQ for ort, trt, openvino; openvino: by NNCF.")
    target_psnr: float | None = option(
        None, "dB that latents, and a VAE's pictures, shall keep \\[default: 35]."
    )
    ranges: str | None = option(None, "min-max, percentile or entropy \\[default: percentile].")
    percentile: float | None = option(None, "In percent \\[default: 99.99].")
    smooth: float | None = option(None, "SmoothQuant's alpha, folded exactly \\[default: 0.5].")
    no_smooth: bool = option(False, "Fold nothing.")
    sensitivity: str | None = option(
        None, "Quantize alone: each layer, each block, or none \\[default: layer]."
    )
    plan: Path | None = option(None, "Replay this plan, edited or not.")
    plan_only: bool = option(False, "Write no bundle; see --save-plan.")
    save_plan: Path | None = option(None, "Write the plan here too (.json).")
    scales: str = option("auto", "fp32: casts around Q/DQ in half graphs.")
    held_out: int | None = option(None, "Drawings kept for judging \\[default: 4].")
    runtime: str | None = option(None, "Judge on ort or openvino.")
    device: str = option("cpu", "Judge on cpu or cuda.")
    rounds: int | None = option(None, "Timed runs of each \\[default: 5].")
    any_speed: bool = option(False, "For another device: judge quality alone.")
    allow_parity_loss: bool = option(False, "Keep a bundle below its gate.")
    allow_slower: bool = option(False, "Keep a bundle that is no gain here.")
    plots: Path | None = option(None, "Folder for two pictures; measures six sets more.")
