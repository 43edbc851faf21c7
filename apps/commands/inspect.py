"""`tiue-export inspect`."""

from __future__ import annotations

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import JsonOptions


@command
def inspect(what: BundleOptions, output: JsonOptions) -> None:
    """Show what a bundle holds: graphs, constants, parity, origin. Verifies every file.

    Example:  tiue-export inspect fox
    """
    from ..inspection import run

    run(what.bundle, output.as_json)
