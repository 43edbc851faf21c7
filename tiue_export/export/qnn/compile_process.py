"""The child process that compiles ONE graph for an HTP: `python -m` this module.

It takes a request (JSON, its argument) and ends with a JSON object on standard output and one of
the exit codes below. A process of its own, because Qualcomm's compiler holds several times a
graph's weights and gives nothing back, and may be killed for it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tiue_export.errors import first_line
from tiue_export.system.memory import peak_memory_bytes
from tiue_export.system.qnn_provider import qnn_session

OK, FAILED = 0, 1


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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def compile_graph(request: CompileRequest) -> dict[str, float | int]:
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


def main(arguments: list[str]) -> int:
    """Compile what the first argument asks for; the exit code says how it ended."""
    request = CompileRequest(**json.loads(arguments[0]))
    # The libraries print to standard output, from C++ too: they get standard error in its place.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer: dict[str, object] = dict(compile_graph(request))
        code = OK
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        answer, code = {"error": first_line(error)}, FAILED
    out.write(json.dumps(answer) + "\n")
    out.flush()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
