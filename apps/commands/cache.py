"""`tiue-export cache`."""

from __future__ import annotations

from dataclasses import dataclass

from ..options.group import OptionGroup, command, option
from ..options.output import JsonOptions


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """What is listed or deleted."""

    clear: bool = option(False, "Delete instead of listing.")
    kind: str | None = option(None, "Only this kind, as the list names it.")
    unused_days: float | None = option(None, "Only what was not used for so long.")


@command
def cache(what: CacheOptions, output: JsonOptions) -> None:
    """Show what is kept on this machine for quicker starts, or delete it.

    Example:  tiue-export cache

    Example:  tiue-export cache --clear --kind openvino --unused-days 30
    """
    from ..cache import run

    run(what.clear, what.kind, what.unused_days, output.as_json)
