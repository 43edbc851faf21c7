"""Whose turn it is: contenders measured A B C A B C ..., each in its own process.

Drift of the machine (heat, other work) then meets all contenders alike, and ratios are taken within
a round. Processes stay alive between their turns as far as memory allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tiue_export.bundle.manifest import structured
from tiue_export.errors import UsageError
from tiue_export.proof.latency_record import Facts, Measurement, Record, Settings, Turn
from tiue_export.system.machine import available_memory_bytes

from .contenders import Contender
from .environment import busy_core_seconds, mapped_file_bytes
from .process import ContenderFailure, WorkerProcess

# Memory left to the rest of the machine when deciding what may stay loaded.
_RESERVE_BYTES = 500_000_000
_SHORT_TURN_S = 0.5


def to_unload(
    loaded: Sequence[tuple[str, int]], needed_bytes: int, available_bytes: int | None
) -> list[str]:
    """Which processes to end so that `needed_bytes` fit; `loaded` is (name, resident bytes).

    `loaded` is in the order of use, the latest last, and the latest goes first: in a cycle of turns
    it is the one that is needed again last.
    """
    if available_bytes is None:
        return []
    chosen = []
    for name, resident_bytes in reversed(loaded):
        if available_bytes >= needed_bytes + _RESERVE_BYTES:
            break
        chosen.append(name)
        available_bytes += resident_bytes
    return chosen


class WorkerPool:
    """The processes that are loaded. Use it as a context manager: it ends them all."""

    def __init__(self, timeout_s: float, *, reload: bool) -> None:
        self._timeout_s = timeout_s
        self._reload = reload
        self._workers: dict[str, WorkerProcess] = {}  # in the order of use
        self._peak_bytes: dict[str, int] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unload(list(self._workers))

    @property
    def loaded(self) -> list[str]:
        """Names of the processes that are there, the latest used last."""
        return list(self._workers)

    def load(self, contender: Contender) -> dict[str, Any] | None:
        """See that the contender's process is there, with room for its peak.

        Returns what it said if it was loaded just now.
        """
        name = contender.name
        own = self._workers.pop(name, None)
        if own is not None:
            self._workers[name] = own  # now the latest used
        self.unload(self._in_the_way(name))
        if own is not None:
            return None
        self._workers[name] = WorkerProcess()
        settings = contender.settings
        request = {"command": "load", "session": settings.kind, "settings": asdict(settings)}
        return self.ask(name, request)

    def _in_the_way(self, name: str) -> list[str]:
        """The processes to end so that the named one has room for its peak."""
        others = {key: worker for key, worker in self._workers.items() if key != name}
        if self._reload:
            return list(others)
        # One that was never seen is taken to need as much as the largest so far.
        needed = self._peak_bytes.get(name, max(self._peak_bytes.values(), default=0))
        if name in self._workers:
            needed = max(0, needed - self._workers[name].resident_bytes)
        available = available_memory_bytes()
        if available is not None:
            # Weights that are mapped must stay in memory, or the next turn of their process
            # would time the disk.
            available -= sum(mapped_file_bytes(worker.pid) for worker in self._workers.values())
        resident = [(key, worker.resident_bytes) for key, worker in others.items()]
        return to_unload(resident, needed, available)

    def ask(self, name: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a loaded process."""
        answer = self._workers[name].ask(request, self._timeout_s)
        peak = int(answer.get("peak_memory_bytes") or 0)
        self._peak_bytes[name] = max(peak, self._peak_bytes.get(name, 0))
        return answer

    def unload(self, names: Sequence[str]) -> None:
        """End some processes."""
        for name in names:
            self._workers.pop(name).close()


@dataclass(frozen=True)
class Earlier:
    """Whole rounds that were measured before, with the contenders' rows by name."""

    rounds: int
    rows: Mapping[str, Measurement]

    @staticmethod
    def of(record: Record | None) -> Earlier:
        """Those of a record; none without one."""
        return (
            Earlier(0, {}) if record is None else Earlier(record.settings.rounds, record.by_name())
        )

    def row_of(self, contender: Contender) -> Measurement | None:
        """The contender's row; with the reason if it can take no further turn."""
        row = self.rows.get(contender.name)
        return row and replace(row, reason=row.reason or contender.missing)


@dataclass
class _Row:
    """A measurement in the making."""

    contender: Contender
    measurement: Measurement


def measure(
    contenders: Sequence[Contender],
    settings: Settings,
    *,
    timeout_s: float,
    on_turn: Callable[[int, Measurement], None] = lambda number, measurement: None,
    on_round: Callable[[int, list[Measurement]], None] = lambda number, measurements: None,
    earlier: Earlier | None = None,
) -> list[Measurement]:
    """Take all turns; a contender that fails keeps its row, with the reason.

    `on_turn` hears of the round and of the contender's measurement so far, after each turn,
    `on_round` of all of them after each whole round. With `earlier` rounds only those that are left
    are taken. Ctrl-C before there is a whole round is raised; later it ends the measuring, and the
    whole rounds are returned. Raises `UsageError` for a contender that is another than it was.
    """
    earlier = earlier or Earlier.of(None)
    rows = {
        contender.name: _Row(contender, earlier.row_of(contender) or _unmeasured(contender))
        for contender in contenders
    }
    whole = earlier.rounds
    try:
        with WorkerPool(timeout_s, reload=settings.reload) as pool:
            for number in range(whole + 1, settings.rounds + 1):
                for name, row in rows.items():
                    if row.measurement.reason is not None:
                        continue
                    try:
                        row.measurement = _take_turn(pool, row, number, settings)
                    except ContenderFailure as failure:
                        if name in pool.loaded:
                            pool.unload([name])
                        row.measurement = replace(row.measurement, reason=_reason(failure, number))
                    on_turn(number, row.measurement)
                whole = number
                on_round(whole, [row.measurement for row in rows.values()])
    except KeyboardInterrupt:
        if whole == 0:
            raise
        return [_up_to(whole, row.measurement) for row in rows.values()]
    return [row.measurement for row in rows.values()]


def _up_to(number_of_round: int, measurement: Measurement) -> Measurement:
    kept = tuple(turn for turn in measurement.turns if turn.round <= number_of_round)
    return replace(measurement, turns=kept)


def _unmeasured(contender: Contender) -> Measurement:
    return Measurement(
        name=contender.name,
        what=contender.what,
        session=contender.settings.kind,
        settings=asdict(contender.settings),
        reason=contender.missing,
    )


def _reason(failure: ContenderFailure, number: int) -> str:
    when = "" if number == 1 else f" (in round {number})"
    return failure.message + when


def _take_turn(pool: WorkerPool, row: _Row, number: int, settings: Settings) -> Measurement:
    """One turn; a process that died beside others gets a second try alone."""
    try:
        return _turn(pool, row, number, settings)
    except ContenderFailure as failure:
        others = [name for name in pool.loaded if name != row.contender.name]
        if not failure.died or not others:
            raise
        pool.unload(pool.loaded)
        return _turn(pool, row, number, settings)


def _turn(pool: WorkerPool, row: _Row, number: int, settings: Settings) -> Measurement:
    contender, so_far = row.contender, row.measurement
    loaded = pool.load(contender)
    if loaded is not None:
        facts = structured(Facts, loaded["facts"], contender.name)
        _require_same(contender.name, so_far.facts, facts)
        so_far = replace(so_far, facts=facts, load_s=so_far.load_s or loaded["load_s"])
    busy = busy_core_seconds()
    request = {"command": "run", "warmup": settings.warmup, "runs": settings.runs}
    answer = pool.ask(contender.name, request)
    turn = Turn(
        round=number,
        latency_ms={stage: tuple(runs) for stage, runs in answer["latency_ms"].items()},
        others_cpu=_others_share(busy, answer),
    )
    if not so_far.turns:
        so_far = replace(so_far, flops=_flops(pool, contender.name))
    return replace(
        so_far,
        turns=(*so_far.turns, turn),
        peak_memory_bytes=_larger(so_far.peak_memory_bytes, answer["peak_memory_bytes"]),
        run_peak_memory_bytes=_larger(
            so_far.run_peak_memory_bytes, answer["run_peak_memory_bytes"]
        ),
    )


def _require_same(name: str, before: Facts | None, now: Facts) -> None:
    """Refuse to add rounds of one thing to rounds of another."""
    for fact in ("weights_sha256", "precision", "device", "size_px", "batch"):
        if before is not None and (was := getattr(before, fact)) != (is_now := getattr(now, fact)):
            raise UsageError(
                f"{name} is not what the earlier rounds measured: its {fact} was {was}, now it is "
                f"{is_now}",
                "Leave --resume out to begin anew.",
            )


def _flops(pool: WorkerPool, name: str) -> dict[str, float]:
    """Operations by stage; a contender that cannot tell them is measured all the same."""
    try:
        flops: dict[str, float] = pool.ask(name, {"command": "count"})["flops"]
    except ContenderFailure as failure:
        if failure.died:
            raise
        return {}
    return flops


def _others_share(busy_before: float | None, answer: Mapping[str, Any]) -> float | None:
    """The share of the machine's CPU time during a turn that was not the contender's."""
    busy_after = busy_core_seconds()
    # The system counts in ticks of 10 ms: a short turn tells nothing.
    if busy_before is None or busy_after is None or answer["wall_s"] < _SHORT_TURN_S:
        return None
    others_s = busy_after - busy_before - float(answer["cpu_s"])
    whole_s = float(answer["wall_s"]) * (os.cpu_count() or 1)
    return round(min(1.0, max(0.0, others_s / whole_s)), 4)


def _larger(first: int | None, second: int | None) -> int | None:
    known = [size for size in (first, second) if size is not None]
    return max(known, default=None)
