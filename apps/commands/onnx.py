"""`tiue-export onnx`."""

from __future__ import annotations

from ..options.checkpoint import CheckpointOptions
from ..options.graphs import ExportRequest
from ..options.group import command
from ..options.onnx import OnnxForm


@command
def onnx(checkpoint: CheckpointOptions, export: ExportRequest, own: OnnxForm) -> None:
    """Export a student, or any Stable Diffusion 1.x/2.x model, to a verified ONNX bundle.

    Example:  tiue-export onnx --ckpt student.safetensors --base sd21-base/ --out fox

    Example:  tiue-export onnx --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from ..export.onnx import export_checkpoint, print_exported

    export.check_one_batch()
    exported = export_checkpoint(checkpoint.ckpt, export, own.precision)
    if exported is not None:
        print_exported(exported, as_json=export.as_json)
