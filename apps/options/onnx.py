"""The options of `tiue-export onnx`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class OnnxForm(OptionGroup):
    """What graphs compute in."""

    panel = "Graphs"
    precision: str = option("fp32", "fp32 (exact, fastest on CPUs) or fp16 (for GPUs).")
