"""One run of the benchmark, from the request to the record: what `tiue-export bench` calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import MANIFEST_FILE, Bundle, open_bundle
from tiue_export.drawing.pipeline import replanned
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.proof.latency_record import (
    UNET,
    Ceiling,
    Environment,
    Measurement,
    Record,
    Settings,
    read_record,
    to_json,
    write_text,
)
from tiue_export.proof.latency_request import (
    LatencyOutcome,
    LatencyOutputs,
    LatencyPlan,
)
from tiue_export.registry.packages import missing_modules
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
)
from tiue_export.system.owned_path import temporary_folder

from ..figure import check_file, check_plot
from ..studies.ceiling import ceilings_in_child, parse_ceilings
from .comparison import compare_with_first_bundle
from .contenders import Contender, bundle_titles, expand
from .environment import describe_environment
from .flops import bundle_flops
from .loop_session import loop_runs, plan_of
from .made_bundle import is_made, made
from .report import first_measured, full_names, markdown, number, standing_warnings
from .settings import GraphSettings, LoopSettings, SessionSettings
from .summary import RATIO_STAGES, summarized
from .turns import Earlier, measure

Tell = Callable[[str], None]


def measure_latency(plan: LatencyPlan, tell: Tell = lambda line: None) -> LatencyOutcome:
    """Measure and write the files; `tell` hears a line for each step.

    Raises `UsageError` for a request that cannot be honoured, before anything is started. What
    fails later is a row of the record with its reason.
    """
    check_settings(plan)
    # Before the bundles are opened: to check the hashes of some takes half a minute of all cores.
    environment = describe_environment()
    request = replace(plan.request, bundles=tuple(open_bundle(path) for path in plan.bundles))
    contenders = expand(request)
    asked = full_names([contender.name for contender in contenders], plan.ratios_to)
    earlier = earlier_record(plan, [contender.name for contender in contenders], environment, tell)
    record = measure_contenders(contenders, plan, environment, tell, earlier)
    ratios_to = asked or first_measured(record)
    changes = compare_with_first_bundle(record, bundle_titles(request.bundles))
    text = to_json(record, summarized(record, ratios_to))
    stopped = record.settings.rounds < plan.settings.rounds
    outcome = LatencyOutcome(record, ratios_to, tuple(changes), text, stopped)
    write_outputs(outcome, plan.outputs)
    return outcome


def measure_contenders(
    contenders: Sequence[Contender],
    plan: LatencyPlan,
    environment: Environment,
    tell: Tell,
    earlier: Record | None = None,
) -> Record:
    """Make the bundles that contenders lack, let all take turns, count operations.

    The record is written after each whole round. With an `earlier` one only the rounds that it
    lacks are measured, and it stays of the day that it began.
    """
    given = parse_ceilings(plan.peaks)
    if environment.is_busy:
        tell(f"warning: the machine is busy: load {environment.load_average[0]:.1f}")
    with work_folder(plan.work) as work:
        contenders = [ready(contender, Path(work), tell) for contender in contenders]
        ceilings = given or (earlier.ceilings if earlier else _ceilings(plan, tell))
        begun = earlier.environment if earlier else environment
        before = Earlier.of(earlier)
        rows_before = [before.row_of(one) for one in contenders]
        turns = sum(
            (one.missing if row is None else row.reason) is None
            for one, row in zip(contenders, rows_before, strict=True)
        )
        told = _Teller(turns, plan.settings, tell)

        def keep(rounds: int, rows: Sequence[Measurement]) -> None:
            if plan.outputs.record is not None and rounds < plan.settings.rounds:
                record = _record_of(begun, plan, rows, ceilings, rounds, "unfinished:")
                text = to_json(record, summarized(record, first_measured(record)))
                write_text(plan.outputs.record, text)

        rows = measure(
            contenders,
            plan.settings,
            timeout_s=plan.timeout_s,
            on_turn=told.turn_taken,
            on_round=keep,
            earlier=before,
        )
        # Graphs are counted from their files, which may go with the folder.
        rows = [counted(one.settings, row) for one, row in zip(contenders, rows, strict=True)]
    rounds = min((len(row.turns) for row in rows if row.measured), default=plan.settings.rounds)
    return _record_of(begun, plan, rows, ceilings, rounds, "stopped by Ctrl-C after")


def _record_of(
    environment: Environment,
    plan: LatencyPlan,
    rows: Sequence[Measurement],
    ceilings: Mapping[str, Ceiling],
    rounds: int,
    if_short: str,
) -> Record:
    settings = replace(plan.settings, rounds=rounds)
    record = Record(environment, settings, tuple(rows), ceilings)
    warnings = standing_warnings(record)
    if rounds < plan.settings.rounds:
        warnings.append(f"{if_short} {rounds} of {plan.settings.rounds} rounds")
    return replace(record, warnings=tuple(warnings))


def earlier_record(
    plan: LatencyPlan, names: Sequence[str], environment: Environment, tell: Tell
) -> Record | None:
    """The record that `--resume` goes on with; None where there is none to go on with.

    Raises `UsageError` for one of other contenders, settings, programs or of another machine.
    """
    if not plan.resume:
        return None
    path = plan.outputs.record
    if path is None:
        raise UsageError(
            "--resume goes on with a record, and --out names none",
            "Add --out RECORD.json: it is written after each round.",
        )
    if not path.exists():
        tell(f"{path} is not there yet: nothing to resume, so this begins")
        return None
    record = read_record(path)
    changed = [
        name
        for name in ("runs", "warmup", "unet_only", "reload")
        if getattr(record.settings, name) != getattr(plan.settings, name)
    ]
    changed += [
        name
        for name in ("cpu", "cores", "packages")
        if getattr(record.environment, name) != getattr(environment, name)
    ]
    if [row.name for row in record.contenders] != list(names):
        changed.insert(0, "contenders")
    if changed:
        raise UsageError(
            f"{path} was measured with other {', '.join(changed).replace('_', '-')}",
            "Repeat the line that began it, or leave --resume out to begin anew.",
        )
    left = plan.settings.rounds - record.settings.rounds
    tell(
        f"{path} holds {record.settings.rounds} of {plan.settings.rounds} rounds"
        if left > 0
        else f"{path} holds {record.settings.rounds} rounds already: nothing is left to measure"
    )
    return record


def check_settings(plan: LatencyPlan) -> None:
    """Refuse numbers that measure nothing, and outputs that cannot be made."""
    settings = plan.settings
    for name, value, least in (
        ("--rounds", settings.rounds, 1),
        ("--runs", settings.runs, 1),
        ("--warmup", settings.warmup, 0),
    ):
        if value < least:
            raise UsageError(f"{name} is {value}; expected {least} or more")
    if plan.timeout_s <= 0:
        raise UsageError(f"--timeout is {plan.timeout_s}; expected seconds above 0")
    threads = plan.request.threads
    if threads is not None and threads < 1:
        raise UsageError(f"--threads is {threads}; expected 1 or more")
    check_plot(plan.outputs.plot)
    check_file("--out", plan.outputs.record)
    check_file("--markdown", plan.outputs.markdown)


def write_outputs(outcome: LatencyOutcome, outputs: LatencyOutputs) -> None:
    """Record, markdown and plot, as far as they were asked for."""
    record, ratios_to = outcome.record, outcome.ratios_to
    if outputs.record is not None:
        write_text(outputs.record, outcome.text)
    if outputs.markdown is not None:
        write_text(outputs.markdown, markdown(record, ratios_to))
    if outputs.plot is not None:
        from .plot import plot_record

        plot_record(record, ratios_to[0] if ratios_to else None, outputs.plot)


def ready(contender: Contender, work: Path, tell: Tell) -> Contender:
    """The contender with the bundles made that it needs; what fails becomes its reason."""
    if contender.missing is not None or not contender.made:
        return contender
    paths = {}
    for setting, asked in contender.made.items():
        if not is_made(asked, work):
            tell(f"{contender.name}: making its graphs")
        try:
            paths[setting] = str(made(asked, work))
        except RuntimeFailure as failure:
            return replace(contender, missing=failure.message)
    # Each is named like the setting that it is for.
    return replace(contender, settings=replace(contender.settings, **paths))  # type: ignore[arg-type]


def work_folder(work: Path | None) -> AbstractContextManager[Path]:
    if work is not None:
        return nullcontext(work)
    return temporary_folder()


def _ceilings(plan: LatencyPlan, tell: Tell) -> Mapping[str, Ceiling]:
    if not plan.measure_peak:
        return {}
    tell("measuring the machine's ceiling")
    try:
        return ceilings_in_child(plan.request.threads)
    except RuntimeFailure as failure:
        tell(f"warning: {failure.message}")
        return {}


def counted(settings: SessionSettings, row: Measurement) -> Measurement:
    """The row with its operations per stage, where its graphs' files tell them."""
    if row.facts is None or missing_modules(("onnx",)):
        return row
    if isinstance(settings, LoopSettings):
        return replace(row, flops=_loop_flops(settings, row.facts.batch))
    if isinstance(settings, GraphSettings):
        return replace(row, flops=_pass_flops(settings, row.facts.batch))
    return row


def _pass_flops(settings: GraphSettings, batch: int) -> dict[str, float]:
    """Operations of a drawing by so many runs of encoder and decoder."""
    whole = str(settings.bundle)
    outer, unet = (_graph_flops(b, batch) for b in (whole, settings.unet_bundle or whole))
    flops = {name: unet[name] * settings.passes for name in UNET_GRAPHS if name in unet}
    if flops:
        flops[UNET] = sum(flops.values())
    for name, times in ((TEXT_ENCODER, 2 if settings.guided else 1), (VAE_DECODER, 1)):
        if name in outer:
            flops[name] = outer[name] * times
    return flops


def _loop_flops(settings: LoopSettings, batch: int) -> dict[str, float]:
    """Operations of a drawing in a loop: decoder runs differ by the steps they get."""
    change = PlanChange(max_decoder_rows=settings.max_decoder_rows)
    bundle = replanned(_counted_bundle(str(settings.bundle)), change)
    runs = loop_runs(plan_of(bundle), settings.loop, batch)
    copies = bundle.manifest.plan.copies
    times = {TEXT_ENCODER: copies, UNET_ENCODER: runs.encoder, VAE_DECODER: 1}
    by_size = {steps: _graph_flops(str(bundle.root), batch, steps) for steps in (1, *runs.decoder)}
    flops = {name: by_size[1][name] * n for name, n in times.items() if name in by_size[1]}
    if all(UNET_DECODER in graphs for graphs in by_size.values()):
        flops[UNET_DECODER] = sum(by_size[g][UNET_DECODER] * n for g, n in runs.decoder.items())
        flops[UNET] = flops[UNET_ENCODER] + flops[UNET_DECODER]
    return flops


def _graph_flops(folder: str, batch: int, steps: int = 1) -> dict[str, float]:
    """Operations of each graph; the files were verified when the contender was loaded."""
    bundle = _counted_bundle(folder)
    try:
        return {name: float(f.total) for name, f in bundle_flops(bundle, batch, steps).items()}
    except UsageError:  # a graph that cannot be counted costs a column, not the run
        return {}


def _counted_bundle(folder: str) -> Bundle:
    file = Path(folder) / MANIFEST_FILE
    return Bundle(Path(folder), Manifest.from_json(file.read_text("utf-8"), str(file)))


class _Teller:
    """Says what each turn took, and how long those will take that are left."""

    def __init__(self, contenders: int, settings: Settings, tell: Tell) -> None:
        self._settings, self._tell, self._contenders = settings, tell, contenders
        self._last_s, self._turn_s = time.monotonic(), dict[str, float]()
        self._round = self._taken = 0

    def turn_taken(self, number_of_round: int, row: Measurement) -> None:
        """One line for a turn."""
        now_s = time.monotonic()
        turn_s, self._last_s = now_s - self._last_s, now_s
        self._taken = self._taken + 1 if number_of_round == self._round else 1
        self._round = number_of_round
        head = f"round {number_of_round} of {self._settings.rounds}"
        if row.reason is not None:
            self._contenders -= 1
            self._taken -= 1
            self._turn_s.pop(row.name, None)
            self._tell(f"{head}  {row.name}: {row.reason}")
            return
        self._turn_s[row.name] = turn_s
        last = row.turns[-1].latency_ms
        parts = [
            f"{stage.replace('_', ' ')} {number(sorted(last[stage])[len(last[stage]) // 2])} ms"
            for stage in RATIO_STAGES
            if stage in last
        ]
        self._tell(f"{head}{self._left()}  {row.name}: {', '.join(parts)}")

    def _left(self) -> str:
        """By the mean of each contender's last turn; loading in the first round counts too."""
        turns = (self._settings.rounds - self._round + 1) * self._contenders - self._taken
        left_s = turns * sum(self._turn_s.values()) / len(self._turn_s)
        if left_s == 0:
            return ""
        return f", {left_s / 60:.0f} min left" if left_s >= 90 else f", {max(left_s, 1):.0f} s left"
