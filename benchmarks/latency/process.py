"""The benchmark's side of a contender's process: start it, ask it, and say why when it dies."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from typing import IO, Any

from tiue_export.errors import RuntimeFailure
from tiue_export.system.child_process import child_command

_WORKER = "tiue_export.benchmarks.latency.worker"
_GOODBYE_S = 20.0


class ContenderFailure(RuntimeFailure):
    """A contender that cannot be measured; `died` if its process is gone."""

    def __init__(self, message: str, next_step: str | None = None, *, died: bool = False) -> None:
        super().__init__(message, next_step)
        self.died = died


class WorkerProcess:
    """A process that answers one question at a time. Use `close` when done with it."""

    def __init__(self) -> None:
        # Libraries talk much on standard error; its end is the reason if the process dies.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            child_command(_WORKER),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the one who asks; it ends its workers
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.resident_bytes = 0

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises `ContenderFailure` with the contender's own words, or how its process ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self._process.kill()
            raise ContenderFailure(
                f"it gave no answer within {timeout_s:.0f} s", "Give it longer: --timeout."
            ) from None
        except OSError:  # the pipe broke: the process is gone
            line = None
        if line is None:
            raise ContenderFailure(self._last_words(), died=True)
        answer: dict[str, Any] = json.loads(line)
        if "failure" in answer:
            raise ContenderFailure(str(answer["failure"]), answer.get("next_step"))
        self.resident_bytes = int(answer.get("resident_bytes") or self.resident_bytes)
        return answer

    def close(self) -> None:
        """Ask it to end, and make sure."""
        process = self._process
        assert process.stdin is not None
        # A dead process cannot be told; closing the pipe ends a living one.
        with contextlib.suppress(OSError):
            process.stdin.write('{"command": "stop"}\n')
            process.stdin.close()
        try:
            process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.join()
        assert process.stdout is not None
        process.stdout.close()
        self._said.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        words = f": {lines[-1].strip()[:200]}" if lines else ""
        if code == -signal.SIGKILL:
            return f"its process was killed (SIGKILL: most often memory ran out){words}"
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}{words}"
        return f"its process ended with exit code {code}{words}"
