"""The options of `tiue-export qnn`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class QnnForm(OptionGroup):
    """Which chips the contexts are for, and how long the compiler looks for the fastest."""

    panel = "Snapdragon"
    soc: tuple[str, ...] = option(
        (), "Chip: sm8550, sm8650, sm8750, sm8850, x-elite ...; several \\[default: sm8650]."
    )
    htp: tuple[str, ...] = option((), "Or its HTP architecture: 69, 73, 75, 79, 81; several.")
    precision: str = option("fp16", "fp16, w8a16 (8-bit weights, what Qualcomm ships) or w8a8.")
    calibration_prompts: Path | None = option(
        None, "For w8a16, w8a8: text file, one prompt a line \\[default: 16 that come along]."
    )
    plan: Path | None = option(
        None, "Layers that stay in half: the plan.json of `quantize`, perhaps edited."
    )
    prove: str = option(
        "whole", "What the emulator runs: whole drawings, unet (one run of it), or nothing."
    )
    optimization: int = option(3, "2 compiles fastest, 3 runs fastest.")
