"""One step for one graph in a process of its own: what it is asked, and what it answers.

Of its own, because Qualcomm's compiler and ONNX Runtime's quantization hold several times a graph's
weights and give nothing back, and may be killed for it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    ResourceError,
    RuntimeFailure,
    TiueError,
    UnsupportedModelError,
    first_line,
)
from tiue_export.system.child_process import child_command
from tiue_export.system.command_line import command_line
from tiue_export.system.qnn_provider import qnn_versions

Request = TypeVar("Request")
Answer = Mapping[str, str | int | float]

COMPILE = "tiue_export.export.qnn.compile_process"
QUANTIZE = "tiue_export.export.qnn.quantize_process"

_OK, _FAILED, _KILLED = 0, 1, -9
# As the provider names what it cannot take.
_UNSUPPORTED = re.compile(r"name: (?P<name>[^,]*), type: (?P<type>\w+)")
_NO_ROOM = re.compile(r"Failed to write context cache file|No space left on device")
_NO_MEMORY = re.compile(r"MEM_ALLOC|bad_alloc|out of memory|MemoryError", re.IGNORECASE)


def ask(bundle: Bundle, graph: str, module: str, request: Any) -> dict[str, Any]:
    """Run `python -m module` on a request, a dataclass of plain values; its answer.

    Raises `UnsupportedModelError` for operations that no HTP runs, `ResourceError` without memory,
    `OSError` on a full disk, `RuntimeFailure` for what else goes wrong.
    """
    done = subprocess.run(
        child_command(module, json.dumps(dataclasses.asdict(request))),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines else {}
    if done.returncode == _OK and answer:
        return dict(answer)
    last = done.stderr.strip().splitlines()[-1:]
    text = str(answer.get("error") or "".join(last) or f"its process ended with {done.returncode}")
    if _NO_ROOM.search(text):
        raise OSError(errno.ENOSPC, text)
    raise failure_of(bundle, graph, module, done.returncode, text, done.stderr)


def failure_of(
    bundle: Bundle, graph: str, module: str, code: int, text: str, log: str
) -> TiueError:
    """The error for a child that ended with `code`, saying `text` and, natively, `log`."""
    quantizing = module == QUANTIZE
    unsupported = {match["type"]: match["name"] for match in _UNSUPPORTED.finditer(log)}
    if unsupported:
        operations = ", ".join(f"{kind} ({name})" for kind, name in unsupported.items())
        return UnsupportedModelError(
            f"{graph} has operations that the HTP does not run: {operations}",
            "Other processors run them: " + command_line("openvino", "--bundle", bundle.root),
        )
    if code == _KILLED or _NO_MEMORY.search(text):
        reason = "the system killed it" if code == _KILLED else text
        done = "quantized" if quantizing else "compiled"
        return ResourceError(
            f"{graph}: memory ran out while it was {done} ({reason})",
            "Free memory, or take --precision fp16, which quantizes nothing."
            if quantizing
            else "Free memory, or export again with --max-decoder-rows 1, for smaller graphs.",
        )
    who = (
        "ONNX Runtime's quantization" if quantizing else f"Qualcomm's compiler {qnn_versions()[1]}"
    )
    return RuntimeFailure(
        f"{who} failed in {graph}: {text}",
        "Check `tiue-export doctor`; tested with onnxruntime-qnn 2.7.0.",
    )


def answer(kind: type[Request], work: Callable[[Request], Answer]) -> int:
    """The child's side: do what its argument asks for; what it answers, and its exit code."""
    request = kind(**json.loads(sys.argv[1]))
    # The libraries print to standard output, from C++ too: they get standard error in its place.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        said, code = dict[str, Any](work(request)), _OK
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        said, code = {"error": first_line(error) or type(error).__name__}, _FAILED
    out.write(json.dumps(said) + "\n")
    out.flush()
    return code
