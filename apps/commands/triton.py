"""`tiue-export triton`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..options.bundle import BundleOptions
from ..options.group import OptionGroup, command, option
from ..options.output import WriteOptions


@dataclass(frozen=True)
class RepositoryOptions(OptionGroup):
    """The model repository to write."""

    panel = "Repository"
    out: Path = option(..., "Folder for the repository.")
    backend: str = option("onnxruntime", "onnxruntime, or tensorrt for a bundle with engines.")
    name: str | None = option(None, "Name of the ensemble \\[default: the bundle's folder].")
    max_batch: int = option(4, "Largest batch, if the bundle's is dynamic.")


@command
def triton(what: BundleOptions, repository: RepositoryOptions, output: WriteOptions) -> None:
    """Write a bundle as a model repository for NVIDIA Triton: each graph, and an ensemble.

    Example:  tiue-export triton fox --out repo/
    """
    from ..triton_repository import run

    run(what.bundle, repository, output)
