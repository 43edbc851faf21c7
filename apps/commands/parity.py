"""`tiue-export parity`."""

from __future__ import annotations

from dataclasses import dataclass

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import JsonOptions
from ..options.runtime import ReferenceOptions, RuntimeChoice


@dataclass(frozen=True)
class ParityCheck(JsonOptions, ReferenceOptions, RuntimeChoice, BundleOptions):
    """A runtime, and the bundle that it is held against."""


@command
def parity(check: ParityCheck) -> None:
    """Hold a runtime on this machine against the reference stored in the bundle.

    Example:  tiue-export parity fox --runtime ort --device cuda
    """
    from ..parity_check import run

    run(check.bundle, check.runtime, check.runtime_options(check), check.as_json)
