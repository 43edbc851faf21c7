"""`tiue-export cache`."""

from __future__ import annotations

from ..options.cache import CacheOptions
from ..options.group import command
from ..options.output import JsonOptions


@command
def cache(what: CacheOptions, output: JsonOptions) -> None:
    """Show what is kept on this machine for quicker starts, or delete it.

    Example:  tiue-export cache

    Example:  tiue-export cache --clear --kind openvino --unused-days 30
    """
    from ..cache import run

    run(what.clear, what.kind, what.unused_days, output.as_json)
