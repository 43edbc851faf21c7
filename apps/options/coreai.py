"""The options of `tiue-export coreai`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class CoreaiForm(OptionGroup):
    """What assets compute in."""

    panel = "Core AI"
    precision: str = option("fp16", "fp16 or fp32.")
