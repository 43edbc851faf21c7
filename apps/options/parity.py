"""The options of `tiue-export parity`."""

from __future__ import annotations

from dataclasses import dataclass

from .bundle import BundleOptions
from .output import JsonOptions
from .runtime import ReferenceOptions, RuntimeChoice, RuntimeOrTorch


@dataclass(frozen=True)
class ParityCheck(JsonOptions, ReferenceOptions, RuntimeOrTorch, RuntimeChoice, BundleOptions):
    """A runtime, and the bundle that it is held against."""
