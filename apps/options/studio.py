"""The options of `tiue-export studio`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..completion import bundle_folders, runtime_names
from .group import OptionGroup, argument, option
from .output import JsonOptions
from .runtime import DeviceOptions, MemoryOptions


@dataclass(frozen=True)
class PageOptions(OptionGroup):
    """What the page offers, and where it is served."""

    panel = "Page"
    bundles: tuple[Path, ...] = argument((), "Bundle folders.", completion=bundle_folders)
    out: Path | None = option(None, "Folder of the history \\[default: gone when it ends].")
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets a phone in.")
    port: int = option(7860, "Port; 0 takes a free one.")
    allowed_host: tuple[str, ...] = option(
        (), "Host header to answer beside addresses \\[default: this machine's names]."
    )
    open_browser: bool = option(False, "Open the browser too.", "--open")


@dataclass(frozen=True)
class OfferedRuntimes(OptionGroup):
    """The runtimes that can be chosen on the page."""

    panel = "Runtime"
    runtimes: tuple[str, ...] = option(
        (),
        "Offer this one only; repeatable \\[default: all that run].",
        "--runtime",
        completion=runtime_names,
    )


@dataclass(frozen=True)
class StudioOptions(JsonOptions, MemoryOptions, DeviceOptions, OfferedRuntimes, PageOptions):
    """A studio of some bundles."""
