"""`tiue-export triton`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..options.bundle import BundleOptions
from ..options.group import OptionGroup, command
from ..options.output import WriteOptions


@dataclass(frozen=True)
class RepositoryOptions(OptionGroup):
    """The model repository to write."""

    panel = "Repository"
    out: Annotated[Path, typer.Option("--out", help="Folder for the repository.")]
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnxruntime, or tensorrt for a bundle with engines."),
    ] = "onnxruntime"
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the ensemble \\[default: the bundle's folder]."),
    ] = None
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Largest batch, if the bundle's is dynamic.")
    ] = 4


@command
def triton(what: BundleOptions, repository: RepositoryOptions, output: WriteOptions) -> None:
    """Write a bundle as a model repository for NVIDIA Triton: each graph, and an ensemble.

    Example:  tiue-export triton fox --out repo/
    """
    from ..triton_repository import run

    run(what.bundle, repository, output)
