"""Qualcomm's emulator of the HTP in a process of its own: `python -m` this module is that process.

Of its own, because the emulator ends its whole process where it fails: SDK 2.51 does so in some
decoders compiled with the shortest search. Here that is an error with the graph's name.

Both ways go frames of 8 bytes of length (little endian) and content. Asked: the context's path,
then the feeds as safetensors. Answered: "" and the outputs as safetensors, or a reason.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load, save

from tiue_export.errors import RuntimeFailure, first_line
from tiue_export.specs import Array, Feeds
from tiue_export.system.child_process import child_command
from tiue_export.system.qnn_provider import qnn_session

_LENGTH_BYTES = 8


class Emulator:
    """The process, started on first use; after a crash the next run starts another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, graph: str, context: Path, feeds: Feeds) -> dict[str, Array]:
        """Run one context. Raises `RuntimeFailure` with the emulator's reason, or its crash."""
        if self._process is None:
            self._process = subprocess.Popen(
                child_command(__name__),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, str(context.resolve()).encode())
            _send(process.stdin, save({k: np.ascontiguousarray(v) for k, v in feeds.items()}))
            reason, outputs = _received(process.stdout), _received(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = process.wait()
            self.close()
            raise RuntimeFailure(
                f"Qualcomm's emulator crashed in {graph} (exit code {code})",
                "Compile with another search: --optimization 2 or 3.",
            ) from error
        except BaseException:  # an interrupt: half a frame would be taken for the next
            self.close()
            raise
        if reason:
            raise RuntimeFailure(f"the HTP failed in {graph}: {reason.decode()}")
        arrays: dict[str, Array] = load(outputs)
        return arrays

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _send(stream: IO[bytes], content: bytes) -> None:
    stream.write(len(content).to_bytes(_LENGTH_BYTES, "little") + content)
    stream.flush()


def _received(stream: IO[bytes]) -> bytes:
    size = int.from_bytes(_exactly(stream, _LENGTH_BYTES), "little")
    return _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main() -> None:
    """Answer until the parent closes its end."""
    # The emulator greets on standard output: what it says goes elsewhere, answers to a copy.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sessions: dict[str, Any] = {}
    while True:
        try:
            path, asked = _received(sys.stdin.buffer).decode(), _received(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if path not in sessions:
                sessions[path] = qnn_session(Path(path), {})
            session = sessions[path]
            names = [output.name for output in session.get_outputs()]
            outputs = dict(zip(names, session.run(names, load(asked)), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            _send(answers, first_line(error).encode())
            _send(answers, b"")
        else:
            _send(answers, b"")
            _send(answers, save(outputs))


if __name__ == "__main__":
    main()
