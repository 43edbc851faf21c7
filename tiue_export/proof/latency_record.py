"""What a benchmark run leaves behind: one JSON file with every timing and its circumstances.

docs/performance.md describes the file for other readers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiue_export.bundle.manifest import structured
from tiue_export.errors import BundleError, UsageError
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.json_file import read_json

FORMAT_VERSION = 1
# A load average above this share of the cores before anything started disturbs what follows.
_BUSY_LOAD_SHARE = 0.25

# Names of stages in `latency_ms`. A whole UNet pass that is not cut in two has no parts.
UNET = "unet"
END_TO_END = "end_to_end"
STAGES = ("text_encoder", "unet_encoder", "unet_decoder", UNET, "vae_decoder", END_TO_END)


@dataclass(frozen=True)
class Environment:
    """Machine, versions and load at the start. `cores` are those this process may use."""

    started_at: str
    program: str
    system: str
    python: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    governor: str | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    load_average: tuple[float, ...]
    packages: dict[str, str]
    variables: dict[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether the machine had other work when the measurement began."""
        return bool(self.load_average) and self.load_average[0] > _BUSY_LOAD_SHARE * self.cores


@dataclass(frozen=True)
class Settings:
    """How it was measured: `runs` timed runs a turn after `warmup` untimed ones, `rounds` turns."""

    rounds: int
    runs: int
    warmup: int
    unet_only: bool
    reload: bool = False


@dataclass(frozen=True)
class Facts:
    """What a contender says of itself once it is loaded.

    `weights_sha256` is the UNet's, where it is known; `size_px` is (width, height); `text_tokens`
    is the length of the text that the UNet attends to.
    """

    device: str
    precision: str
    versions: Mapping[str, str]
    size_px: tuple[int, ...]
    batch: int
    threads: int | None = None
    weights_sha256: str | None = None
    text_tokens: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One contender's part of one round. `latency_ms` has one value per timed run and stage.

    `others_cpu` is the share of the machine's CPU time, in [0, 1], that other processes took.
    """

    round: int
    latency_ms: Mapping[str, tuple[float, ...]]
    others_cpu: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One contender's row. `reason` says why it was not measured, or not to the end.

    `flops` are floating-point operations per stage and run (2 per multiply-add), attention
    included. `peak_memory_bytes` is the process's peak in all; `run_peak_memory_bytes` its peak
    once it was loaded, without what loading took for a moment.
    """

    name: str
    what: str
    session: str
    settings: Mapping[str, str | int | float | bool | None]
    turns: tuple[Turn, ...] = ()
    reason: str | None = None
    facts: Facts | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    load_s: float | None = None
    peak_memory_bytes: int | None = None
    run_peak_memory_bytes: int | None = None

    @property
    def measured(self) -> bool:
        """Whether every turn was taken."""
        return self.reason is None and bool(self.turns)

    def rounds(self, stage: str) -> list[tuple[float, ...]]:
        """The timed runs of a stage in ms, round by round; empty if it was not measured."""
        if not self.measured or any(stage not in turn.latency_ms for turn in self.turns):
            return []
        return [turn.latency_ms[stage] for turn in self.turns]

    def runs(self, stage: str) -> list[float]:
        """All timed runs of a stage in ms."""
        return [value for values in self.rounds(stage) for value in values]


@dataclass(frozen=True)
class Ceiling:
    """The fastest that a precision was seen to compute here, and by what."""

    tflops: float
    measured_by: str


@dataclass(frozen=True)
class Record:
    """One run of the benchmark; `ceilings` by precision."""

    environment: Environment
    settings: Settings
    contenders: tuple[Measurement, ...]
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    format_version: int = FORMAT_VERSION

    def by_name(self) -> dict[str, Measurement]:
        """The rows under their names."""
        return {entry.name: entry for entry in self.contenders}

    def missing(self) -> list[str]:
        """The rows that were not measured, each with its reason."""
        return [
            f"{entry.name}: not measured: {entry.reason or 'it had no turn'}"
            for entry in self.contenders
            if not entry.measured
        ]


def to_json(record: Record, summary: Mapping[str, Any]) -> str:
    """The file's text; `summary` holds what readers would compute, and is not read back."""
    data = {**dataclasses.asdict(record), "summary": summary}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a report file, with an error that says what to do where that fails."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def read_record(path: Path) -> Record:
    """Read a record back; anything else is refused with `UsageError`."""
    try:
        data = read_json(path)
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}"
            )
        data.pop("summary", None)
        record: Record = structured(Record, data, str(path))
    except (OSError, ValueError, BundleError) as error:
        message = error.message if isinstance(error, BundleError) else str(error)
        raise UsageError(
            f"{path} is no record of tiue-export bench: {message}",
            "Make one: tiue-export bench BUNDLE --out record.json",
        ) from error
    return record
