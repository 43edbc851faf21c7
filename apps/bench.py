"""`tiue-export bench`: how fast a bundle is here, beside what people would use instead."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tiue_export.errors import RuntimeFailure, UsageError

from .report.tables import console, print_json

# The benchmark is another spoke, so it is reached by name.
_PACKAGE = "tiue_export.benchmarks.latency"


@dataclass(frozen=True)
class BenchRequest:
    """The options of `tiue-export bench`; lists hold what was given between commas too."""

    bundles: tuple[Path, ...]
    runtimes: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    ratios_to: tuple[str, ...] = ()
    device: str = "cpu"
    ckpt: str | None = None
    base: str | None = None
    vae: str | None = None
    rounds: int = 5
    runs: int = 3
    warmup: int = 1
    threads: int | None = None
    height: int | None = None
    width: int | None = None
    unet_only: bool = False
    reload: bool = False
    peaks: tuple[str, ...] = ()
    measure_peak: bool = True
    work: Path | None = None
    timeout_s: float = 3600.0
    out: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None
    compare: tuple[Path, Path] | None = None
    fail_if_slower: str | None = None
    as_json: bool = False


def run(request: BenchRequest) -> None:
    """Measure, or compare two records; print; end with exit code 11 if something is too slow."""
    comparison = importlib.import_module(f"{_PACKAGE}.comparison")
    limit = None
    if request.fail_if_slower is not None:
        limit = comparison.parse_limit(request.fail_if_slower)
    if request.compare is not None:
        changes = _compare(request, comparison)
    else:
        changes = _measure(request, comparison, limit)
    if limit is not None:
        comparison.require_not_slower(changes, limit)


def _compare(request: BenchRequest, comparison: Any) -> Any:
    if request.bundles:
        raise UsageError(
            "--compare takes two records and no bundle",
            "tiue-export bench --compare before.json now.json",
        )
    assert request.compare is not None
    read_record = importlib.import_module(f"{_PACKAGE}.record").read_record
    before, now = (read_record(path) for path in request.compare)
    changes = comparison.compare_records(before, now)
    notes = comparison.environment_changes(before, now)
    if request.markdown is not None:
        write_text = importlib.import_module(f"{_PACKAGE}.record").write_text
        write_text(request.markdown, comparison.change_markdown(changes, notes))
    if request.as_json:
        print_json({"changes": comparison.changes_json(changes), "environment": notes})
        return changes
    console.print(comparison.change_table(changes))
    for note in notes:
        console.print(f"differs: {note}", markup=False)
    return changes


def _measure(request: BenchRequest, comparison: Any, limit: float | None) -> Any:
    if limit is not None and len(request.bundles) < 2:
        raise UsageError(
            "--fail-if-slower compares bundles with the first one; expected two or more",
            "Give two bundles, or --compare with two records.",
        )
    bench = importlib.import_module(f"{_PACKAGE}.bench")
    report = importlib.import_module(f"{_PACKAGE}.report")
    stderr = Console(stderr=True)
    quiet = request.as_json
    outcome = bench.run(
        _plan(request, bench),
        lambda line: None if quiet else stderr.print(line, markup=False, highlight=False),
    )
    if request.as_json:
        print(outcome.text, end="")
    else:
        console.print(report.rich_table(outcome.record, outcome.ratios_to))
        for line in report.missing_lines(outcome.record):
            console.print(f"[yellow]-[/] {escape(line)}")
        for warning in outcome.record.warnings:
            console.print(f"[bold yellow]warning:[/] {escape(warning)}")
    if not outcome.ratios_to:
        raise RuntimeFailure("nothing could be measured; the reasons stand above")
    if outcome.stopped:
        raise KeyboardInterrupt("stopped; the rounds that were whole are reported and written")
    return comparison.compare_with_first_bundle(outcome.record, outcome.bundle_titles)


def _plan(request: BenchRequest, bench: Any) -> Any:
    contenders = importlib.import_module(f"{_PACKAGE}.contenders")
    record = importlib.import_module(f"{_PACKAGE}.record")
    asked = contenders.Request(
        contenders=request.contenders,
        runtimes=request.runtimes,
        precisions=request.precisions,
        device=request.device,
        checkpoint=request.ckpt,
        base=request.base,
        vae=request.vae,
        threads=request.threads,
        height=request.height,
        width=request.width,
        unet_only=request.unet_only,
    )
    settings = record.Settings(
        rounds=request.rounds,
        runs=request.runs,
        warmup=request.warmup,
        unet_only=request.unet_only,
        reload=request.reload,
    )
    return bench.Plan(
        bundles=request.bundles,
        request=asked,
        settings=settings,
        ratios_to=request.ratios_to,
        peaks=request.peaks,
        measure_peak=request.measure_peak,
        work=request.work,
        timeout_s=request.timeout_s,
        outputs=bench.Outputs(request.out, request.markdown, request.plot),
    )
