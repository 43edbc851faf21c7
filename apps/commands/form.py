"""The command of a backend whose form has no options of its own: made of its registry entry."""

from __future__ import annotations

from collections.abc import Callable

from tiue_export.registry.backends import BACKENDS

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.group import command


def form_commands() -> tuple[Callable[..., None], ...]:
    """One for each backend that has an exporter and no command in this folder."""
    return tuple(
        _form_command(name)
        for name, entry in BACKENDS.items()
        if entry.exporter and not entry.command
    )


def _form_command(name: str) -> Callable[..., None]:
    def form(source: SourceOptions, export: ExportRequest) -> None:
        from ..export.exporter import run

        run(name, source, export)

    entry = BACKENDS[name]
    form.__name__, form.__doc__ = (
        name,
        f"Add graphs for {entry.title} to a bundle: {entry.summary}.\n\n"
        f"    Example:  tiue-export {name} --bundle fox\n",
    )
    return command(form)
