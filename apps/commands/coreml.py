"""`tiue-export coreml`."""

from __future__ import annotations

from ..options.checkpoint import StudentSourceOptions
from ..options.coreml import CoremlForm
from ..options.graphs import ExportRequest
from ..options.group import command


@command
def coreml(source: StudentSourceOptions, own: CoremlForm, export: ExportRequest) -> None:
    """Make Core ML packages for Mac, iPhone and iPad: on any machine, and proven on it.

    Each saved package is executed by an evaluator of its own and held against the student.

    Example:  tiue-export coreml --ckpt student.safetensors --base sd21-base/ --profile iphone

    Example:  tiue-export coreml --ckpt student.safetensors --base sd21-base/ --target-mb 450

    Example:  tiue-export coreml --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from ..export.coreml import run

    run(source, own, export)
