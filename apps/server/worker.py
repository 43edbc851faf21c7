"""The one thread that owns the runtime, and the bounded queue before it.

Requests become orders of one or more pictures. Pictures of different orders share a run where the
bundle takes several at once. What was accepted is drawn, unless its order is cancelled.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tiue_export.bundle.read import open_bundle
from tiue_export.drawing.pipeline import Job, Picture, Pipeline, Result
from tiue_export.errors import RuntimeFailure
from tiue_export.registry.support import require_support
from tiue_export.specs import RuntimeOptions

from ..options.serve import ServerLimits
from .metrics import ServerMetrics

_log = logging.getLogger(__name__)
# A run that fails once may be its prompt's fault; three in a row are the runtime's.
_FAILURES_OF_THE_RUNTIME = 3
_NEWEST_WEIGHT = 0.2


class QueueFull(Exception):
    """There is no room for an order; `retry_after_s` is when there may be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; expected to have room in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Closing(Exception):
    """The worker finishes what it has and takes nothing more."""


@dataclass(eq=False)
class Order:
    """The pictures of one request; `future` holds them, in order, once all are drawn."""

    jobs: tuple[Job, ...]
    future: Future[list[Picture]] = field(default_factory=Future)
    cancelled: bool = False
    accepted_s: float = 0.0
    drawn: dict[int, Picture] = field(default_factory=dict)


@dataclass(frozen=True)
class _Item:
    """One picture of an order."""

    order: Order
    index: int

    @property
    def job(self) -> Job:
        return self.order.jobs[self.index]


def pipeline_opener(bundle: Path, runtime: str, options: RuntimeOptions) -> Callable[[], Pipeline]:
    """What the drawing thread opens; a missing or damaged bundle is an error at once."""
    opened = open_bundle(bundle)
    require_support("serve", opened)
    return lambda: Pipeline.open(opened, runtime, options)


class DrawingWorker:
    """Opens the pipeline in its own thread, as GPU contexts belong to one, and draws there."""

    def __init__(
        self,
        open_pipeline: Callable[[], Pipeline],
        limits: ServerLimits | None = None,
        metrics: ServerMetrics | None = None,
    ) -> None:
        self.metrics = metrics or ServerMetrics()
        self._open_pipeline = open_pipeline
        self._limits = limits or ServerLimits()
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._running = 0
        self._closing = False
        self._opened: Future[Pipeline] = Future()
        self._picture_s = 0.0
        self._failures_in_a_row = 0
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)

    def start(self) -> Pipeline:
        """Open the runtime and draw once, so that the first request is as quick as the rest.

        Raises what opening raised. The pipeline is for reading; only this worker runs it.
        """
        self._thread.start()
        return self._opened.result()

    @property
    def pipeline(self) -> Pipeline:
        """The opened pipeline, for reading."""
        return self._opened.result(timeout=0)

    @property
    def waiting(self) -> int:
        """Pictures accepted and not yet begun."""
        return len(self._waiting)

    @property
    def fault(self) -> str | None:
        """Why this worker serves no more, or None while it does."""
        if self._closing:
            return "closing"
        if not self._thread.is_alive():
            return "stopped"
        if self._failures_in_a_row >= _FAILURES_OF_THE_RUNTIME:
            return "failing"
        return None

    def submit(self, jobs: Sequence[tuple[str, int] | Job]) -> Order:
        """Queue pictures; `QueueFull` or `Closing` when they are not."""
        order = Order(tuple(Job(*job) for job in jobs))
        # A future that is running cannot be cancelled by whoever awaits it: `cancel` does that.
        order.future.set_running_or_notify_cancel()
        with self._changed:
            if self._closing:
                raise Closing
            if len(self._waiting) + len(order.jobs) > self._limits.queue_pictures:
                raise QueueFull(self._retry_after_s())
            order.accepted_s = time.monotonic()
            self._waiting.extend(_Item(order, index) for index in range(len(order.jobs)))
            self._tell_waiting()
            self._changed.notify_all()
        return order

    def cancel(self, order: Order) -> None:
        """Forget an order; pictures of it that wait are not drawn. Does nothing to a drawn one."""
        with self._changed:
            order.cancelled = True
            self._drop_waiting(order)

    def close(self) -> None:
        """Draw what was accepted, then close the runtime. May be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _retry_after_s(self) -> int:
        pictures = len(self._waiting) + self._running
        return max(1, math.ceil(pictures * self._picture_s))

    def _tell_waiting(self) -> None:
        self.metrics.waiting.set(len(self._waiting))

    def _drop_waiting(self, order: Order) -> None:
        self._waiting = deque(item for item in self._waiting if item.order is not order)
        self._tell_waiting()

    def _work(self) -> None:
        try:
            pipeline = self._open_pipeline()
            start = time.monotonic()
            pipeline.draw([("warm-up", 0)])
            self._picture_s = time.monotonic() - start
        except BaseException as error:
            self._opened.set_exception(error)
            return
        with pipeline:
            self._opened.set_result(pipeline)
            _, largest = pipeline.batch_range()
            while items := self._take(largest):
                self._draw(pipeline, items)
                self._running = 0

    def _take(self, largest: int) -> list[_Item]:
        """The next run's pictures; none when all is drawn and the worker is to close."""
        items: list[_Item] = []
        with self._changed:
            while not items:  # what waited may be cancelled while the run fills up
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing and not self._waiting:
                    return []
                if largest > 1:
                    self._changed.wait_for(
                        lambda: len(self._waiting) >= largest or self._closing,
                        self._limits.batch_wait_ms / 1e3,
                    )
                count = min(largest, len(self._waiting))
                items = [self._waiting.popleft() for _ in range(count)]
            self._running = len(items)
            self._tell_waiting()
        now = time.monotonic()
        for item in items:
            self.metrics.wait_seconds.observe(now - item.order.accepted_s)
        return items

    def _draw(self, pipeline: Pipeline, items: list[_Item]) -> None:
        """Draw one run; where it fails, each of its orders is tried alone."""
        orders = list(dict.fromkeys(item.order for item in items))
        start = time.monotonic()
        try:
            result = pipeline.draw([item.job for item in items])
        except Exception as error:
            if len(orders) > 1:
                for order in orders:
                    self._draw(pipeline, [item for item in items if item.order is order])
                return
            self._failures_in_a_row += 1
            _log.error("a run failed: %s", error, exc_info=_unexplained(error))
            self._fail(orders[0], error)
            return
        self._failures_in_a_row = 0
        self._record(result, time.monotonic() - start, len(items))
        for item, picture in zip(items, result.pictures, strict=True):
            item.order.drawn[item.index] = picture
        for order in orders:
            if len(order.drawn) == len(order.jobs) and not order.future.done():
                order.future.set_result([order.drawn[i] for i in range(len(order.jobs))])

    def _fail(self, order: Order, error: Exception) -> None:
        with self._changed:
            self._drop_waiting(order)
        if not order.future.done():
            order.future.set_exception(error)

    def _record(self, result: Result, run_s: float, pictures: int) -> None:
        newest = run_s / pictures
        self._picture_s += _NEWEST_WEIGHT * (newest - self._picture_s)
        self.metrics.pictures.inc(pictures)
        self.metrics.run_pictures.observe(pictures)
        self.metrics.run_seconds.observe(run_s)
        for stage, latencies_ms in result.stage_latency_ms.items():
            for latency_ms in latencies_ms:
                self.metrics.stage_seconds.labels(stage).observe(latency_ms / 1e3)


def _unexplained(error: Exception) -> bool:
    """Whether the log needs a traceback to say what went wrong."""
    return not isinstance(error, RuntimeFailure)
