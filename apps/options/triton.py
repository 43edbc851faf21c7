"""The options of `tiue-export triton`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .group import OptionGroup, option


@dataclass(frozen=True)
class RepositoryOptions(OptionGroup):
    """The model repository to write."""

    panel = "Repository"
    out: Path = option(..., "Folder for the repository.")
    backend: str = option("onnxruntime", "onnxruntime, or tensorrt for a bundle with engines.")
    name: str | None = option(None, "Name of the ensemble \\[default: the bundle's folder].")
    max_batch: int | None = option(None, "Largest batch, if the bundle's is open \\[default: 4].")
