"""What a worker process opens and runs: the interface of a contender, and its stopwatch."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

from tiue_export.proof.latency_record import END_TO_END, UNET, Facts

from .settings import GraphSettings, LoopSettings, SdCppSettings, SessionSettings, TorchSettings

# Module and class by the settings' kind. Opened in the worker only: each imports its own backend.
SESSIONS: Mapping[str, tuple[type[SessionSettings], str, str]] = {
    GraphSettings.kind: (GraphSettings, "graph_session", "GraphSession"),
    LoopSettings.kind: (LoopSettings, "loop_session", "LoopSession"),
    TorchSettings.kind: (TorchSettings, "torch_session", "TorchSession"),
    SdCppSettings.kind: (SdCppSettings, "sd_cpp_session", "SdCppSession"),
}
_UNET_PARTS = ("unet_encoder", "unet_decoder")


class Session(Protocol):
    """A loaded contender. `facts` may be asked for after the first run."""

    @property
    def facts(self) -> Facts:
        """What it says of itself."""
        ...

    def run(self) -> dict[str, float]:
        """One drawing; milliseconds by stage. Raises when its numbers are not finite."""
        ...

    def count(self) -> dict[str, float]:
        """Floating-point operations by stage of one drawing, where running it can tell them."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


def open_session(kind: str, settings: Mapping[str, Any]) -> Session:
    """Load a contender by the kind of its session and the values of its settings."""
    description, module, name = SESSIONS[kind]
    opened = getattr(importlib.import_module(f".{module}", __package__), name)
    return cast(Session, opened(description(**settings)))


class StageClock:
    """Times stages of one drawing. Of `total` repetitions `timed` are run: those are scaled up."""

    def __init__(self, timed: int = 1, total: int = 1) -> None:
        self.whole_s = 0.0
        self._scale = total / timed
        self._seconds: dict[str, float] = {}
        self._scaled: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, *, scaled: bool = False) -> Iterator[None]:
        """Add the time of the block to a stage; `scaled`: it is one of the repetitions."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start, scaled=scaled)

    def add(self, name: str, seconds: float, *, scaled: bool = False) -> None:
        """Add time to a stage."""
        times = self._scaled if scaled else self._seconds
        times[name] = times.get(name, 0.0) + seconds

    def latency_ms(self, whole: str | None = END_TO_END) -> dict[str, float]:
        """Milliseconds by stage, the UNet's parts also as their sum; `whole_s` under `whole`."""
        seconds = dict(self._seconds)
        for name, value in self._scaled.items():
            seconds[name] = seconds.get(name, 0.0) + value * self._scale
        parts = [seconds[name] for name in _UNET_PARTS if name in seconds]
        if UNET not in seconds and len(parts) == len(_UNET_PARTS):
            seconds[UNET] = sum(parts)
        if whole is not None:
            left_out = sum(self._scaled.values()) * (self._scale - 1)
            seconds[whole] = self.whole_s + left_out
        return {name: value * 1e3 for name, value in seconds.items()}
