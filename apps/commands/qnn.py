"""`tiue-export qnn`."""

from __future__ import annotations

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.group import command
from ..options.qnn import QnnForm


@command
def qnn(source: SourceOptions, own: QnnForm, export: ExportRequest) -> None:
    """Add Snapdragon NPU contexts to a bundle, compiled here and proven in Qualcomm's emulator.

    Example:  tiue-export qnn --bundle fox --soc sm8650

    Example:  tiue-export qnn --ckpt student.safetensors --base sd21-base/ --soc x-elite --out fox

    Example:  tiue-export qnn --bundle fox --htp 73 --htp 75 --htp 79

    Example:  tiue-export qnn --bundle fox --precision w8a16 --calibration-prompts prompts.txt
    """
    from ..export.qnn import run

    run(source, own, export)
