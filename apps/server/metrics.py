"""The figures at /metrics, in Prometheus' text format."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
# One pass takes from some 10 ms on a large GPU to minutes on a small CPU.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class ServerMetrics:
    """Counters and histograms of one server; several may live in one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        counter = partial(Counter, registry=registry)
        seconds = partial(Histogram, buckets=_SECONDS, registry=registry)
        self.model = Info("tiue_model", "The bundle and what runs it", registry=registry)
        self.requests = counter("tiue_requests", "Answers", ["path", "status"])
        self.request_seconds = seconds(
            "tiue_request_seconds", "From a request's first byte to its answer's last", ["path"]
        )
        self.pictures = counter("tiue_pictures", "Pictures drawn")
        self.refused = counter(
            "tiue_requests_unserved",
            "Requests that got no picture: queue_full, timeout, client_gone, failed",
            ["reason"],
        )
        self.waiting = Gauge(
            "tiue_waiting_pictures", "Pictures accepted and not yet begun", registry=registry
        )
        self.wait_seconds = seconds(
            "tiue_wait_seconds", "From acceptance to the start of a picture's run"
        )
        self.run_seconds = seconds("tiue_run_seconds", "One run of all graphs")
        self.stage_seconds = seconds("tiue_stage_seconds", "One run of one graph", ["stage"])
        self.run_pictures = seconds(
            "tiue_run_pictures", "Pictures that shared a run", buckets=(1, 2, 3, 4, 6, 8, 16)
        )

    def text(self) -> bytes:
        """All figures in the exposition format."""
        return generate_latest(self._registry)
