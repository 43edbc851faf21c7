"""From timings to what they say: medians, percentiles, and ratios with a confidence interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tiue_export.proof.latency_change import Ratio
from tiue_export.proof.latency_record import END_TO_END, STAGES, UNET, Measurement, Record
from tiue_export.specs import Array

CONFIDENCE = 0.95
_RESAMPLES = 10_000
# Stages that ratios are given for: one is a part of the other.
RATIO_STAGES = (UNET, END_TO_END)

# After a method, in what ratios are taken to: in the runtime and precision of each contender.
ANY = "/*"

Rounds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Spread:
    """Of all timed runs, in ms. p10 and p90 are percentiles, interpolated."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int


def spread(runs: Sequence[float]) -> Spread:
    """Median and percentiles of at least one run."""
    p10, median, p90 = np.percentile(np.asarray(runs, dtype=np.float64), [10, 50, 90])
    return Spread(float(median), float(p10), float(p90), len(runs))


def paired_ratio(own: Rounds, first: Rounds) -> Ratio:
    """Time of `own` over time of `first`, measured in the same rounds (one inner list a round).

    The geometric mean over rounds of the ratio of the rounds' medians; the interval is the
    percentile bootstrap (Efron 1979) over rounds, seeded.
    """
    logs = _log_medians(own) - _log_medians(first)  # (rounds,)
    return _bootstrapped(logs.mean(), lambda random: _resampled_means(logs, random), len(logs))


def unpaired_ratio(own: Rounds, other: Rounds) -> Ratio:
    """The same for two separate runs of the benchmark: each side's rounds are resampled alone."""
    mine, theirs = _log_medians(own), _log_medians(other)

    def draw(random: np.random.RandomState) -> Array:
        return _resampled_means(mine, random) - _resampled_means(theirs, random)

    return _bootstrapped(mine.mean() - theirs.mean(), draw, min(len(mine), len(theirs)))


def ratio_to(own: Measurement, first: Measurement | None, stage: str) -> Ratio | None:
    """Time of a stage over another contender's; None where either lacks it."""
    if first is None:
        return None
    mine, theirs = own.rounds(stage), first.rounds(stage)
    return paired_ratio(mine, theirs) if mine and theirs else None


def denominator(
    entry: Measurement, name: str, rows: Mapping[str, Measurement]
) -> Measurement | None:
    """What `entry` is divided by: the contender `name`, or for "METHOD/*" that method in the
    entry's own runtime and precision; None where it has none."""
    if not name.endswith(ANY):
        return rows.get(name)
    own = "/".join(entry.name.rsplit("/", 2)[1:])
    return rows.get(f"{name.removesuffix(ANY)}/{own}")


def spreads(measurement: Measurement) -> dict[str, Spread]:
    """Of every stage that was measured, the known ones first and in order."""
    if not measurement.measured:
        return {}
    found = set.intersection(*(set(turn.latency_ms) for turn in measurement.turns))
    order = [*(s for s in STAGES if s in found), *sorted(found - set(STAGES))]
    return {stage: spread(measurement.runs(stage)) for stage in order}


def achieved_tflops(measurement: Measurement) -> dict[str, float]:
    """Operations per second by stage, in 10^12, where operations and time are known."""
    known = spreads(measurement)
    return {
        stage: flops / known[stage].median_ms / 1e9
        for stage, flops in measurement.flops.items()
        if stage in known and known[stage].median_ms > 0
    }


def peak_share(measurement: Measurement, record: Record, stage: str) -> float | None:
    """Achieved operations over the measured ceiling of the contender's precision."""
    if measurement.facts is None or measurement.facts.precision not in record.ceilings:
        return None
    tflops = achieved_tflops(measurement).get(stage)
    ceiling = record.ceilings[measurement.facts.precision].tflops
    return None if tflops is None else tflops / ceiling


def summarized(record: Record, ratios_to: Sequence[str]) -> dict[str, Any]:
    """The computed part of the JSON file: per contender spreads, ratios and shares of the peak."""
    rows = record.by_name()
    return {entry.name: _summarized(entry, record, ratios_to, rows) for entry in record.contenders}


def _summarized(
    entry: Measurement,
    record: Record,
    ratios_to: Sequence[str],
    rows: Mapping[str, Measurement],
) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for name in ratios_to:
        first = denominator(entry, name, rows)
        found = {stage: ratio_to(entry, first, stage) for stage in RATIO_STAGES}
        ratios[name] = {s: asdict(ratio) for s, ratio in found.items() if ratio is not None}
    return {
        "latency": {stage: asdict(value) for stage, value in spreads(entry).items()},
        "ratio_to": ratios,
        "tflops": achieved_tflops(entry),
        "peak_share": {
            stage: share
            for stage in entry.flops
            if (share := peak_share(entry, record, stage)) is not None
        },
    }


def _log_medians(rounds: Rounds) -> Array:
    """(rounds,) logarithms of each round's median."""
    return np.log([float(np.median(runs)) for runs in rounds])


def _resampled_means(values: Array, random: np.random.RandomState) -> Array:
    """(resamples,) means of as many values drawn with replacement."""
    picks = random.randint(0, len(values), (_RESAMPLES, len(values)))
    means: Array = values[picks].mean(axis=1)
    return means


def _bootstrapped(log_value: float, draw: Any, rounds: int) -> Ratio:
    value = float(np.exp(log_value))
    if rounds < 2:
        return Ratio(value)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draw(np.random.RandomState(0)), [tail, 100 - tail])
    return Ratio(value, float(np.exp(low)), float(np.exp(high)))
