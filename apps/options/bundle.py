"""The bundle that a command reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..completion import bundle_folders
from .group import OptionGroup


@dataclass(frozen=True)
class BundleOptions(OptionGroup):
    """One bundle."""

    bundle: Annotated[
        Path,
        typer.Argument(help="Bundle folder.", show_default=False, autocompletion=bundle_folders),
    ]
