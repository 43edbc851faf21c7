"""Stopping a drawing that nobody waits for any more, between two graphs of a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tiue_export.drawing.pipeline import Pipeline
from tiue_export.specs import Array, BatchLimited, ChainResult, ChainRuntime, Feeds, Runtime


class Stale(Exception):
    """The drawing was stopped: a newer request has taken its place."""


class StoppableRuntime:
    """A runtime that looks before each graph whether the picture is still wanted."""

    def __init__(self, runtime: Runtime, is_stale: Callable[[], bool]) -> None:
        self.name, self.device = runtime.name, runtime.device
        self.precision = runtime.precision
        self._runtime, self._is_stale = runtime, is_stale

    def run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        """Run one graph; raises `Stale` instead when a newer request has come."""
        if self._is_stale():
            raise Stale
        return self._runtime.run(graph, feeds)

    def close(self) -> None:
        """Nothing is held: the runtime belongs to who opened it."""


class StoppableChain(StoppableRuntime):
    """The same for a runtime that may run all graphs in one go."""

    def __init__(self, runtime: Runtime, chain: ChainRuntime, is_stale: Callable[[], bool]) -> None:
        super().__init__(runtime, is_stale)
        self._chain = chain

    def run_chain(self, input_ids: Array, noise: Array) -> ChainResult | None:
        """As the runtime does; None where it goes graph by graph."""
        return self._chain.run_chain(input_ids, noise)


def stoppable(pipeline: Pipeline, is_stale: Callable[[], bool]) -> Pipeline:
    """The same pipeline, stoppable between graphs; one with batch limits of its own as it is."""
    runtime = pipeline.runtime
    if isinstance(runtime, BatchLimited):
        return pipeline
    if isinstance(runtime, ChainRuntime):
        return replace(pipeline, runtime=StoppableChain(runtime, runtime, is_stale))
    return replace(pipeline, runtime=StoppableRuntime(runtime, is_stale))
