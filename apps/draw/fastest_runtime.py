"""`--runtime auto`: try what can run, say what was chosen and on what evidence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.specs import Array, RuntimeOptions

from ..report.tables import titled
from .runtime_choice import (
    AUTO,
    Chosen,
    RuntimeChoice,
    Trial,
    choose_runtime,
    remembered_choices,
)


def resolved_runtime(
    bundle: Bundle | Path,
    name: str,
    options: RuntimeOptions,
    *,
    quiet: bool,
    control: Array | None = None,
) -> tuple[str, Chosen | None]:
    """The runtime's name, and for "auto" how it was chosen; told on standard error.

    `control` (3, 8H, 8W) is the picture that a bundle with a ControlNet follows.
    """
    if name != AUTO:
        return name, None
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    stderr = Console(stderr=True, quiet=quiet, highlight=False)

    def started(runtime: str) -> None:
        stderr.print(f"  trying {runtime} ...", markup=False, soft_wrap=True)

    def tried(trial: Trial) -> None:
        stderr.print(f"  {_outcome(trial)}", markup=False, soft_wrap=True)

    chosen = choose_runtime(opened, options, control=control, on_start=started, on_trial=tried)
    stderr.print(_sentence(chosen), markup=False, soft_wrap=True)
    return chosen.choice.runtime, chosen


def choice_facts(chosen: Chosen) -> Mapping[str, object]:
    """For `--json`: what was chosen, why it was measured now, every trial."""
    return {
        "runtime": chosen.choice.runtime,
        "measured_at": chosen.choice.measured_at,
        "remembered": not chosen.why,
        "why_measured": chosen.why or None,
        "latency_ms": {t.runtime: t.latency_ms for t in chosen.choice.trials},
        "reasons": {t.runtime: t.reason for t in chosen.choice.trials if t.reason},
        "file": str(chosen.file),
    }


def choice_rows() -> list[dict[str, str]]:
    """For `doctor`: each remembered choice; `outdated` says what differs now, "" where nothing."""
    rows = []
    for file, choice in remembered_choices():
        if choice is None:
            row = {"bundle": "", "runtime": "", "evidence": "", "outdated": "cannot be read"}
        else:
            row = {
                "bundle": choice.bundle,
                "runtime": _name(choice.trials[0]),
                "evidence": _evidence(choice),
                "outdated": choice.outdated(),
            }
        rows.append({**row, "file": str(file)})
    return rows


def choice_table(rows: list[dict[str, str]]) -> Table:
    """The remembered choices as people read them."""
    columns = ("bundle", "runtime", "evidence", "still true", "to forget it, delete")
    table = titled("Fastest runtime (--runtime auto)", *columns)
    for row in rows:
        outdated = row["outdated"]
        state = Text(f"no: {outdated}", "yellow") if outdated else Text("yes", "green")
        table.add_row(*(row[key] for key in ("bundle", "runtime", "evidence")), state, row["file"])
    return table


def _sentence(chosen: Chosen) -> str:
    choice = chosen.choice
    when = f"measured now: {chosen.why}" if chosen.why else f"measured {choice.measured_at[:10]}"
    return f"runtime {_name(choice.trials[0])}, {_evidence(choice)} ({when})"


def _evidence(choice: RuntimeChoice) -> str:
    """Times of all that could draw, fastest first, and who could not."""
    able = [trial for trial in choice.trials if trial.latency_ms is not None]
    times = [f"{_seconds(able[0])} a picture"]
    times += [f"{trial.runtime} {_seconds(trial)}" for trial in able[1:]]
    unable = [trial.runtime for trial in choice.trials if trial.latency_ms is None]
    return ", ".join(times) + (f"; not {', '.join(unable)}" if unable else "")


def _outcome(trial: Trial) -> str:
    if trial.latency_ms is None:
        return f"{trial.runtime}: {trial.reason}"
    return f"{_name(trial)}: {_seconds(trial)} a picture"


def _name(trial: Trial) -> str:
    return f"{trial.runtime} ({trial.device})"


def _seconds(trial: Trial) -> str:
    return f"{(trial.latency_ms or 0) / 1e3:.3g} s"
