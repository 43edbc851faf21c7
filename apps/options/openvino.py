"""The options of `tiue-export openvino`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class OpenvinoForm(OptionGroup):
    """How OpenVINO stores the graphs, and the arithmetic they are proven in."""

    panel = "OpenVINO"
    weights: str = option("fp32", "fp32, or fp16 for files half the size.")
    precision: tuple[str, ...] = option((), "Arithmetic to prove \\[default: all this CPU has].")
