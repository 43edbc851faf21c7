"""Chunks drawn over a Ray cluster by Ray Data, handed back in order.

Only this process writes files: the machines of the cluster need the bundle under the same path, and
no shared output folder.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import RuntimeFailure, TiueError, UsageError
from tiue_export.registry.backends import BACKENDS

from ...ray_cluster import connected
from .drawing import PipelineSource, Sample, draw_jobs
from .plan import Chunk

_MOST_BLOCKS = 4096
_GPUS = ("cuda", "rtx")


def draw_on_ray(
    source: PipelineSource, chunks: Sequence[Chunk], workers: int
) -> Iterator[tuple[Chunk, list[Sample]]]:
    """Draw with `workers` actors, each with a pipeline of its own."""
    with connected("ray.data"):
        import ray

        cpus, gpus = _needs(source)
        _check_room(ray.cluster_resources(), workers, cpus, gpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        drawn = ray.data.from_items(
            [{"task": pickle.dumps((source, chunk))} for chunk in chunks],
            override_num_blocks=min(len(chunks), _MOST_BLOCKS),
        ).map_batches(
            _Drawer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        try:
            for row in drawn.iter_rows():
                chunk, outcome = pickle.loads(row["outcome"])
                if isinstance(outcome, TiueError):
                    raise outcome
                yield chunk, outcome
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise RuntimeFailure(
                f"Ray stopped drawing: {last}", "What was drawn is kept: run the same line again."
            ) from error


class _Drawer:
    """An actor's own pipeline, opened at its first chunk.

    What it raises travels as a result: Ray Data keeps no more than the text of an exception.
    """

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        tasks = [pickle.loads(bytes(task)) for task in batch["task"]]
        outcomes = [(chunk, self._draw(source, chunk)) for source, chunk in tasks]
        return {"outcome": [pickle.dumps(outcome) for outcome in outcomes]}

    def _draw(self, source: PipelineSource, chunk: Chunk) -> list[Sample] | TiueError:
        try:
            self._pipeline = self._pipeline or source.open()
            return draw_jobs(self._pipeline, chunk.jobs)
        except TiueError as error:
            return error


def _needs(source: PipelineSource) -> tuple[float, float]:
    """Cores and GPUs of one actor."""
    options = source.options
    on_gpu = BACKENDS[source.runtime].on_gpu or options.device in _GPUS or options.provider in _GPUS
    return float(options.threads or 1), float(on_gpu)


def _check_room(cluster: dict[str, float], workers: int, cpus: float, gpus: float) -> None:
    """Ray would wait for ever for an actor that no machine has room for."""
    for kind, each in (("CPU", cpus), ("GPU", gpus)):
        have = cluster.get(kind, 0.0)
        if workers * each > have:
            raise UsageError(
                f"{workers} workers need {workers * each:g} {kind}s; the Ray cluster has {have:g}",
                f"Pass --workers {max(1, int(have // each))}, or fewer --threads.",
            )
