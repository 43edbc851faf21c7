"""What `tiue-export bench` is asked to measure, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tiue_export.bundle.read import Bundle
from tiue_export.proof.latency_change import Change
from tiue_export.proof.latency_record import Record, Settings


@dataclass(frozen=True)
class ContenderRequest:
    """Everything that decides who takes part.

    `runtimes` and `precisions` empty: what the bundles can run on here. `contenders` empty: the
    usual ones. Sizes in pixels, None: the first bundle's, or the checkpoint's own.
    """

    bundles: tuple[Bundle, ...] = ()
    contenders: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    device: str = "cpu"
    checkpoint: str | None = None
    base: str | None = None
    vae: str | None = None
    threads: int | None = None
    height: int | None = None
    width: int | None = None
    unet_only: bool = False


@dataclass(frozen=True)
class LatencyOutputs:
    """Files to write, None for none."""

    record: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class LatencyPlan:
    """A whole run. `peaks` are "PRECISION=TFLOPS"; without any, they are measured if
    `measure_peak`. `work` keeps bundles that are made for measuring; None: they are removed.
    `resume`: the rounds that the record to write holds already are not measured again."""

    bundles: tuple[Path, ...]
    request: ContenderRequest
    settings: Settings
    ratios_to: tuple[str, ...] = ()
    peaks: tuple[str, ...] = ()
    measure_peak: bool = True
    work: Path | None = None
    timeout_s: float = 3600.0
    resume: bool = False
    outputs: LatencyOutputs = field(default_factory=LatencyOutputs)


@dataclass(frozen=True)
class LatencyOutcome:
    """The record, the contenders its ratios are taken to, and the JSON text of both.

    `changes`: each further bundle against the first one in the same runtime and precision.
    `stopped`: by Ctrl-C, after at least one whole round.
    """

    record: Record
    ratios_to: tuple[str, ...]
    changes: tuple[Change, ...]
    text: str
    stopped: bool = False
