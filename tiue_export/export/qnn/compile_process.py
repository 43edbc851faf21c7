"""The child process that compiles ONE graph for an HTP: `python -m` this module, see child.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiue_export.system.memory import peak_memory_bytes
from tiue_export.system.qnn_provider import qnn_session

from .child import Answer, answer


@dataclass(frozen=True)
class CompileRequest:
    """Compile `onnx` into `context`, an ONNX file that refers to a binary beside it.

    `htp` is a number such as "75", `model` the chip's in Qualcomm's SDK. `sizes` are those of the
    open axes, which an HTP does not have.
    """

    onnx: str
    context: str
    htp: str
    model: int
    optimization: int
    sizes: Mapping[str, int] = field(default_factory=dict)


def compile_graph(request: CompileRequest) -> Answer:
    """Write the context; what the parent puts into its report. Raises what ONNX Runtime raises."""
    start = time.perf_counter()
    settings = {
        "htp_arch": request.htp,
        "soc_model": str(request.model),
        "enable_htp_fp16_precision": "1",
        # 3 takes longest and is the fastest on the device (QNN execution provider's docs).
        "htp_graph_finalization_optimization_mode": str(request.optimization),
        # What goes in and out is float; nothing of it may be left to the CPU.
        "offload_graph_io_quantization": "0",
    }
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": request.context,
        "ep.context_embed_mode": "0",
    }
    qnn_session(Path(request.onnx), settings, entries, request.sizes)
    return {
        "compile_s": round(time.perf_counter() - start, 2),
        "peak_memory_bytes": peak_memory_bytes(),
    }


if __name__ == "__main__":
    sys.exit(answer(CompileRequest, compile_graph))
