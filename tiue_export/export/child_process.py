"""A job in a child process of its own: its memory comes back whole, and a crash is one message."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from tiue_export.errors import ResourceError

_POLL_S = 0.25
Q = TypeVar("Q")
T = TypeVar("T")
Progress = Callable[[float, str], None]


def run_in_child(
    job: Callable[[Q], T],
    request: Q,
    *,
    preload: str,
    progress_file: Path | None = None,
    on_progress: Progress = lambda fraction, detail: None,
) -> T:
    """`job(request)` in a fresh process, forked from one that has imported the module `preload`.

    The job is a function of a module, request and result can be pickled. Its temporary files are
    removed with it: libraries that do so in an exit handler leave them, which children do not run.
    What it writes to `progress_file`, [fraction, detail] in JSON, is told to `on_progress`. Raises
    what the job raises, and `ResourceError` where its process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    with (
        tempfile.TemporaryDirectory(prefix="tiue-") as folder,
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        future = pool.submit(_with_temporary_files_in, folder, job, request)
        try:
            return _wait(future, progress_file, on_progress)
        except BrokenProcessPool as error:
            raise ResourceError(
                "the process that converts was killed, most likely because memory ran out",
                "Close other programs; a smaller --height and --width needs less.",
            ) from error


def run_here(job: Callable[[Q], T], request: Q) -> T:
    """The same in this process: faster for small work, and memory adds up."""
    with tempfile.TemporaryDirectory(prefix="tiue-") as folder:
        return _with_temporary_files_in(folder, job, request)


def _with_temporary_files_in(folder: str, job: Callable[[Q], T], request: Q) -> T:
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        return job(request)
    finally:
        tempfile.tempdir = before


def _wait(future: Future[T], progress_file: Path | None, on_progress: Progress) -> T:
    while True:
        try:
            return future.result(timeout=_POLL_S)
        except StillRunning:
            if future.done():
                raise  # the job itself timed out on something
            if progress_file is not None and progress_file.is_file():
                fraction, detail = json.loads(progress_file.read_text("utf-8"))
                on_progress(float(fraction), str(detail))
