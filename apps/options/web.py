"""The options of `tiue-export web`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class SiteOptions(OptionGroup):
    """The site to write, and what its page says."""

    panel = "Site"
    out: Path = option(..., "Folder for the site.")
    title: str | None = option(None, "The page's title \\[default: the student's name].")
    prompt: str = option("", "A prompt that stands there at first, and is drawn.")
    packages: Path | None = option(
        None, "A node_modules folder \\[default: fetched once by npm, and kept]."
    )
    open_page: bool = option(False, "Serve it on this machine, and open it.", "--open")
    port: int = option(8000, "Where --open serves it; 0 takes any free one.")
