"""The options of `tiue-export coreml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class CoremlForm(OptionGroup):
    """What packages are made for; None is the profile's own setting."""

    panel = "Core ML"
    profile: str = option("mac-gpu", "mac-gpu, mac-ane, ipad or iphone; sets what follows.")
    target: str | None = option(
        None, "iOS16 to iOS18, or macOS13 to macOS15.", "--min-deployment-target"
    )
    attention: str | None = option(None, "sdpa, split or split-chunked.")
    linear: str | None = option(None, "linear, or conv: channels first, for the Neural Engine.")
    decoder_batch: int | None = option(None, "Timesteps decoded at once: 1, 2 or 4; all exact.")
    precision: str = option("fp16", "fp16 or fp32.")
    compress: str | None = option(
        None, "none, palettize-8/-6/-4 (-grouped), int8, int4, w8a8 or recipe."
    )
    target_psnr: float | None = option(None, "Choose bits per layer for latents this near, in dB.")
    target_mb: float | None = option(None, "Choose bits per layer for a UNet of this size.")
    bits: Path | None = option(None, "Bits per layer: the recipe.json of an earlier export.")
    calibration_prompts: Path | None = option(None, "For w8a8: text file, one prompt a line.")
    compute_unit: str | None = option(
        None, "What to recommend: ALL, CPU_AND_GPU, CPU_AND_NE, CPU_ONLY."
    )
    size: tuple[str, ...] = option((), "HEIGHTxWIDTH in pixels; several make one package (iOS18).")
    swift_bundle: bool = option(False, "Also write vocabulary, constants and compile.sh for Swift.")
