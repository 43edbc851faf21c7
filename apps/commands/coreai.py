"""`tiue-export coreai`."""

from __future__ import annotations

from ..options.checkpoint import StudentSourceOptions
from ..options.coreai import CoreaiForm
from ..options.graphs import ExportRequest
from ..options.group import command


@command
def coreai(source: StudentSourceOptions, own: CoreaiForm, export: ExportRequest) -> None:
    """Experimental: Core AI assets for macOS and iOS 27, run here by Apple's interpreter.

    Example:  tiue-export coreai --ckpt student.safetensors --base sd21-base/ --out fox

    Example:  tiue-export coreai --ckpt student.safetensors --base sd21-base/ --precision fp32
    """
    from ..export.coreai import run

    run(source, own, export)
