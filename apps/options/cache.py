"""The options of `tiue-export cache`."""

from __future__ import annotations

from dataclasses import dataclass

from .group import OptionGroup, option


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """What is listed or deleted."""

    clear: bool = option(False, "Delete instead of listing.")
    kind: str | None = option(None, "Only this kind, as the list names it.")
    unused_days: float | None = option(None, "Only what was not used for so long.")
