"""`tiue-export onnx`."""

from __future__ import annotations

from dataclasses import dataclass

from ..options.checkpoint import CheckpointOptions
from ..options.graphs import ExportRequest
from ..options.group import OptionGroup, command, option


@dataclass(frozen=True)
class OnnxForm(OptionGroup):
    """What graphs compute in."""

    panel = "Graphs"
    precision: str = option("fp32", "fp32 (exact, fastest on CPUs) or fp16 (for GPUs).")


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
