"""`tiue-export cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ..options.group import OptionGroup, command
from ..options.output import JsonOptions


@dataclass(frozen=True)
class CacheOptions(OptionGroup):
    """What is listed or deleted."""

    clear: Annotated[bool, typer.Option("--clear", help="Delete instead of listing.")] = False
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only this kind, as the list names it.")
    ] = None
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", help="Only what was not used for so long.")
    ] = None


@command
def cache(what: CacheOptions, output: JsonOptions) -> None:
    """Show what is kept on this machine for quicker starts, or delete it.

    Example:  tiue-export cache

    Example:  tiue-export cache --clear --kind openvino --unused-days 30
    """
    from ..cache import run

    run(what.clear, what.kind, what.unused_days, output.as_json)
