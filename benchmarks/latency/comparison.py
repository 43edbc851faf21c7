"""Two records side by side, or the bundles of one."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from tiue_export.proof.latency_change import Change, Comparison, ratio_text
from tiue_export.proof.latency_record import END_TO_END, UNET, Measurement, Record

from ..markdown import table_lines
from .report import number
from .summary import ratio_to, spread, unpaired_ratio

_HEAD = ("contender", "stage", "before ms", "now ms", "now / before [95 %]")


def compare_records(before: Record, now: Record) -> Comparison:
    """Every contender of either record, by name, and what else differs."""
    old, new = before.by_name(), now.by_name()
    names = dict.fromkeys([*old, *new])
    changes = tuple(_change(name, old.get(name), new.get(name)) for name in names)
    return Comparison(changes, tuple(_environment_changes(before, now)))


def compare_with_first_bundle(record: Record, titles: Sequence[str]) -> list[Change]:
    """Each further bundle of one run against the first bundle in the same runtime and precision.

    Taken in turn, their ratio is paired by round: the strictest check there is.
    """
    rows = record.by_name()
    changes = []
    for entry in record.contenders:
        title, _, lane = entry.name.partition("/")
        if title not in titles or title == titles[0] or f"{titles[0]}/{lane}" not in rows:
            continue
        first = rows[f"{titles[0]}/{lane}"]
        stage = _common_stage(first, entry)
        if stage is None:
            changes.append(_incomparable(entry.name, first, entry))
            continue
        before, now = (spread(e.runs(stage)).median_ms for e in (first, entry))
        changes.append(Change(entry.name, stage, before, now, ratio_to(entry, first, stage)))
    return changes


def _environment_changes(before: Record, now: Record) -> list[str]:
    """What differs between the two machines or set-ups: ratios then mean more than the program."""
    found = []
    for name in ("system", "python", "cpu", "cores", "governor", "packages", "variables"):
        old, new = getattr(before.environment, name), getattr(now.environment, name)
        if old != new:
            found.append(f"{name}: {_shown(old)} -> {_shown(new)}")
    if before.settings != now.settings:
        found.append(f"settings: {_shown(before.settings)} -> {_shown(now.settings)}")
    return found


def change_table(changes: Sequence[Change]) -> Table:
    """One row per contender."""
    table = Table(title="Now against before", title_justify="left", title_style="bold")
    table.add_column(_HEAD[0], overflow="fold")
    for title in _HEAD[1:]:
        table.add_column(title, justify="right", overflow="fold")
    for row in _cells(changes):
        table.add_row(*map(escape, row))
    return table


def change_markdown(compared: Comparison) -> str:
    """The same as markdown, with what else differs."""
    lines = table_lines(_HEAD, _cells(compared.changes), 2)
    if compared.notes:
        lines += ["", *(f"- {note}" for note in compared.notes)]
    return "\n".join(lines) + "\n"


def _change(name: str, old: Measurement | None, new: Measurement | None) -> Change:
    if old is None:
        return Change(name, "-", reason="not in the record before")
    if new is None:
        return Change(name, "-", reason="not in the record now", gone=old.measured)
    stage = _common_stage(old, new)
    if stage is None:
        return _incomparable(name, old, new)
    before, now = old.rounds(stage), new.rounds(stage)
    return Change(
        name,
        stage,
        spread(old.runs(stage)).median_ms,
        spread(new.runs(stage)).median_ms,
        unpaired_ratio(now, before),
    )


def _incomparable(name: str, old: Measurement, new: Measurement) -> Change:
    if old.measured and new.measured:
        return Change(name, "-", reason="they have no stage in common")
    side, entry = ("now", new) if not new.measured else ("before", old)
    return Change(name, "-", reason=f"not measured {side}: {entry.reason}", gone=old.measured)


def _common_stage(old: Measurement, new: Measurement) -> str | None:
    return next((s for s in (END_TO_END, UNET) if old.rounds(s) and new.rounds(s)), None)


def _cells(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    return [
        (c.name, c.reason or "-", "-", "-", "-")
        if c.ratio is None or c.before_ms is None or c.now_ms is None
        else (c.name, c.stage, number(c.before_ms), number(c.now_ms), ratio_text(c.ratio))
        for c in changes
    ]


def _shown(value: object) -> str:
    return str(value)[:160]
