"""Chunks drawn by one or several processes of this machine, handed back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import ResourceError, RuntimeFailure
from tiue_export.system.child_process import end_with_parent

from .drawing import PipelineSource, Sample, draw_jobs
from .plan import Chunk, TableJob

# In flight per worker: one being drawn, one waiting.
_AHEAD = 2


def draw_here(
    source: PipelineSource, chunks: Iterable[Chunk]
) -> Iterator[tuple[Chunk, list[Sample]]]:
    """Draw in this process."""
    with source.open() as pipeline:
        for chunk in chunks:
            yield chunk, draw_jobs(pipeline, chunk.jobs)


def draw_in_processes(
    source: PipelineSource, chunks: Iterable[Chunk], workers: int
) -> Iterator[tuple[Chunk, list[Sample]]]:
    """Draw in `workers` processes, each with a pipeline of its own.

    They end with this process, however it ends: a child that outlived a killed parent would keep
    memory and cores from the run that follows. Without `threads` the cores are shared out.
    """
    if source.options.threads is None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        source = replace(source, options=replace(source.options, threads=threads))
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),)
    )
    waiting: deque[tuple[Chunk, Future[list[Sample]]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_draw, source, chunk.jobs)))
            if len(waiting) >= _AHEAD * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
        pool.shutdown()
    finally:
        pool.shutdown(cancel_futures=True)


def _next(
    waiting: deque[tuple[Chunk, Future[list[Sample]]]],
) -> tuple[Chunk, list[Sample]]:
    chunk, future = waiting.popleft()
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a worker process was killed, as happens when memory runs out",
            "Run the same line again with fewer --workers; what was drawn is kept.",
        ) from error


_pipeline: Pipeline | None = None


def _draw(source: PipelineSource, jobs: tuple[TableJob, ...]) -> list[Sample]:
    global _pipeline
    if _pipeline is None:
        _pipeline = source.open()
    try:
        return draw_jobs(_pipeline, jobs)
    except RuntimeFailure as failure:
        raise RuntimeFailure(
            f"{failure.message} (drawing {jobs[0].key} to {jobs[-1].key})", failure.next_step
        ) from failure


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, who ends us
    end_with_parent(parent)
