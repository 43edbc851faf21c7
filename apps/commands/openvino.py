"""`tiue-export openvino`."""

from __future__ import annotations

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.group import command
from ..options.openvino import OpenvinoForm


@command
def openvino(source: SourceOptions, own: OpenvinoForm, export: ExportRequest) -> None:
    """Add OpenVINO graphs to a bundle: the fastest way to run a student on an Intel or AMD CPU.

    Example:  tiue-export openvino --bundle fox

    Example:  tiue-export openvino --ckpt student.safetensors --base sd21-base/ --out fox

    Example:  tiue-export openvino --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from ..export.openvino import run

    run(source, own, export)
