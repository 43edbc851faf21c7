"""`tiue-export triton`."""

from __future__ import annotations

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import WriteOptions
from ..options.triton import RepositoryOptions


@command
def triton(what: BundleOptions, repository: RepositoryOptions, output: WriteOptions) -> None:
    """Write a bundle as a model repository for NVIDIA Triton: each graph, and an ensemble.

    Example:  tiue-export triton fox --out repo/
    """
    from ..triton_repository import run

    run(what.bundle, repository, output)
