"""`tiue-export studio`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..completion import bundle_folders, runtime_names
from ..options.group import OptionGroup, command
from ..options.output import JsonOptions
from ..options.runtime import DeviceOptions, MemoryOptions


@dataclass(frozen=True)
class PageOptions(OptionGroup):
    """What the page offers, and where it is served."""

    panel = "Page"
    bundles: Annotated[
        tuple[Path, ...],
        typer.Argument(help="Bundle folders.", show_default=False, autocompletion=bundle_folders),
    ] = ()
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the history \\[default: gone when it ends]."),
    ] = None
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets a phone in.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.")] = 7860
    open_browser: Annotated[bool, typer.Option("--open", help="Open the browser too.")] = False


@dataclass(frozen=True)
class OfferedRuntimes(OptionGroup):
    """The runtimes that can be chosen on the page."""

    panel = "Runtime"
    runtimes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--runtime",
            autocompletion=runtime_names,
            help="Offer this one only; repeatable \\[default: all that run].",
        ),
    ] = ()


@dataclass(frozen=True)
class StudioOptions(JsonOptions, MemoryOptions, DeviceOptions, OfferedRuntimes, PageOptions):
    """A studio of some bundles."""


@command
def studio(request: StudioOptions) -> None:
    """Try a student in the browser: draw while typing, compare runtimes, read the bundle.

    Example:  tiue-export studio fox --open

    Example:  tiue-export studio fox-fp32 fox-fp16 --out pictures
    """
    from ..studio.serving import run

    run(request)
