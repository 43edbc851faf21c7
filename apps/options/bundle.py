"""The bundle that a command reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..completion import bundle_folders
from .group import OptionGroup, argument


@dataclass(frozen=True)
class BundleOptions(OptionGroup):
    """One bundle."""

    bundle: Path = argument(..., "Bundle folder.", completion=bundle_folders)
