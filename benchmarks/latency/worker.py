"""One contender's process: loads it, then runs it when told. JSON lines in, JSON lines out.

Started by `process.py`, not by hand. It imports only what its contender needs, so that memory and
start-up are the contender's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tiue_export.errors import TiueError, first_line

from .environment import forget_peak, process_memory_bytes
from .session import Session, open_session


def main() -> None:
    """Answer one line for each line read; end when the parent is gone."""
    # Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = _private_stdout()
    worker = _Worker()
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "stop":
            break
        try:
            answer = worker.answer(request)
        except TiueError as error:
            answer = {"failure": error.message, "next_step": error.next_step}
        except Exception as error:  # whatever a backend raises is this contender's result
            answer = {"failure": f"{type(error).__name__}: {first_line(error)}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()


class _Worker:
    def __init__(self) -> None:
        self._session: Session | None = None
        self._load_peak_bytes = 0
        self._forgets = False

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one request."""
        if request["command"] == "load":
            return self._load(request)
        assert self._session is not None
        if request["command"] == "count":
            return {"flops": self._session.count()}
        return self._run(self._session, int(request["warmup"]), int(request["runs"]))

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self._session = open_session(request["session"], request["settings"])
        # Backends load lazily: the first drawing belongs to loading.
        self._session.run()
        seconds = time.perf_counter() - start
        self._load_peak_bytes = process_memory_bytes()[1]
        self._forgets = forget_peak()
        return {
            "load_s": seconds,
            "facts": dataclasses.asdict(self._session.facts),
            **self._memory(),
        }

    def _run(self, session: Session, warmup: int, runs: int) -> dict[str, Any]:
        before = sum(os.times()[:2])
        start = time.perf_counter()
        for _ in range(warmup):
            session.run()
        timed = [session.run() for _ in range(runs)]
        wall_s = time.perf_counter() - start
        return {
            "latency_ms": {stage: [run[stage] for run in timed] for stage in timed[0]},
            "wall_s": wall_s,
            "cpu_s": sum(os.times()[:2]) - before,
            **self._memory(),
        }

    def _memory(self) -> dict[str, int | None]:
        resident, peak = process_memory_bytes()
        return {
            "resident_bytes": resident,
            "peak_memory_bytes": max(peak, self._load_peak_bytes),
            "run_peak_memory_bytes": peak if self._forgets else None,
        }

    def close(self) -> None:
        if self._session is not None:
            self._session.close()


def _private_stdout() -> TextIO:
    """The pipe to the parent; what libraries print to standard output goes to standard error."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


if __name__ == "__main__":
    main()
