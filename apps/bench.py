"""`tiue-export bench`: how fast a bundle is here, beside what people would use instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.proof.latency_change import Change, parse_limit, require_not_slower
from tiue_export.proof.latency_record import Settings, read_record, write_text
from tiue_export.proof.latency_request import ContenderRequest, LatencyOutputs, LatencyPlan
from tiue_export.registry.spokes import (
    change_markdown,
    change_table,
    compare_records,
    latency_table,
    measure_latency,
)

from .options.bench import BenchRequest
from .options.group import picked
from .report.tables import console, print_json

_LISTS = ("runtimes", "precisions", "contenders", "ratios_to", "peaks")


def run(request: BenchRequest) -> None:
    """Measure, or compare two records; print; end with exit code 11 if something is too slow."""
    limit = None if request.fail_if_slower is None else parse_limit(request.fail_if_slower)
    if request.compare is not None:
        changes = _compare(request, *request.compare)
    else:
        changes = _measure(request, limit)
    if limit is not None:
        require_not_slower(changes, limit)


def _compare(request: BenchRequest, before: Path, now: Path) -> Sequence[Change]:
    if request.bundles:
        raise UsageError(
            "--compare takes two records and no bundle",
            "tiue-export bench --compare before.json now.json",
        )
    compared = compare_records(read_record(before), read_record(now))
    if request.markdown is not None:
        write_text(request.markdown, change_markdown(compared))
    if request.as_json:
        changes = [asdict(change) for change in compared.changes]
        print_json({"changes": changes, "environment": compared.notes})
        return compared.changes
    console.print(change_table(compared.changes))
    for note in compared.notes:
        console.print(f"differs: {note}", markup=False)
    return compared.changes


def _measure(request: BenchRequest, limit: float | None) -> Sequence[Change]:
    if limit is not None and len(request.bundles) < 2:
        raise UsageError(
            "--fail-if-slower compares bundles with the first one; expected two or more",
            "Give two bundles, or --compare with two records.",
        )
    stderr = Console(stderr=True, quiet=request.as_json, highlight=False)
    outcome = measure_latency(_plan(request), lambda line: stderr.print(line, markup=False))
    if request.as_json:
        print(outcome.text, end="")
    else:
        console.print(latency_table(outcome.record, outcome.ratios_to))
        for line in outcome.record.missing():
            console.print(f"[yellow]-[/] {escape(line)}")
        for warning in outcome.record.warnings:
            console.print(f"[bold yellow]warning:[/] {escape(warning)}")
    if not outcome.ratios_to:
        raise RuntimeFailure("nothing could be measured; the reasons stand above")
    if outcome.stopped:
        raise KeyboardInterrupt("stopped; the rounds that were whole are reported and written")
    return outcome.changes


def _plan(request: BenchRequest) -> LatencyPlan:
    lists: dict[str, Any] = {name: _listed(getattr(request, name)) for name in _LISTS}
    request = replace(request, **lists)
    contenders = picked(ContenderRequest, request, bundles=(), checkpoint=request.ckpt)
    return picked(
        LatencyPlan,
        request,
        request=contenders,
        settings=picked(Settings, request),
        measure_peak=not request.no_peak,
        outputs=LatencyOutputs(request.out, request.markdown, request.plot),
    )


def _listed(values: tuple[str, ...]) -> tuple[str, ...]:
    """Options that may be repeated, or hold several values between commas."""
    return tuple(part for value in values for part in value.split(",") if part)
