"""The options of `tiue-export qnn`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class QnnForm(OptionGroup):
    """Which chips the contexts are for, and how long the compiler looks for the fastest."""

    panel = "Snapdragon"
    soc: tuple[str, ...] = option(
        (), "Chip: sm8550, sm8650, sm8750, sm8850, x-elite ...; several \\[default: sm8650]."
    )
    htp: tuple[str, ...] = option((), "Or its HTP architecture: 69, 73, 75, 79, 81; several.")
    optimization: int = option(3, "2 compiles fastest, 3 runs fastest.")
