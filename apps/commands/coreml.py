"""`tiue-export coreml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.checkpoint import StudentSourceOptions
from ..options.graphs import ExportRequest
from ..options.group import OptionGroup, command, option


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
    recipe: Path | None = option(None, "Bits per layer from an earlier export.")
    calibration_prompts: Path | None = option(None, "For w8a8: text file, one prompt a line.")
    compute_unit: str | None = option(
        None, "What to recommend: ALL, CPU_AND_GPU, CPU_AND_NE, CPU_ONLY."
    )
    size: tuple[str, ...] = option((), "HEIGHTxWIDTH in pixels; several make one package (iOS18).")
    swift_bundle: bool = option(False, "Also write vocabulary, constants and compile.sh for Swift.")


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
