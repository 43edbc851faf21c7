"""The table of a benchmark run: on the terminal with rich, and as markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from tiue_export.errors import UsageError
from tiue_export.proof.latency_change import ratio_text
from tiue_export.proof.latency_record import END_TO_END, UNET, Measurement, Record

from ..markdown import table_lines
from .summary import ANY, denominator, peak_share, ratio_to, spreads

_PART_TITLES: Mapping[str, str] = {
    "text_encoder": "text",
    "unet_encoder": "encoder",
    "unet_decoder": "decoder",
    UNET: "UNet",
    "vae_decoder": "VAE",
    END_TO_END: "end to end",
}
_OTHERS_LIMIT = 0.1


@dataclass(frozen=True)
class Column:
    """One column: `cell(row)` is "-" where a row has nothing to say."""

    title: str
    cell: Callable[[Measurement], str]


def full_names(names: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    """The contenders that `--ratio-to` means: a beginning is enough where it fits one alone.

    A method that several runtimes or precisions have becomes "METHOD/*": each contender is then
    divided by the one in its own runtime and precision.
    """
    found = []
    for text in asked:
        if sum(name.rsplit("/", 2)[0] == text for name in names) > 1:
            found.append(f"{text}{ANY}")
            continue
        begun = [name for name in names if name.startswith(text)]
        fitting = [text] if text in names else begun
        if len(fitting) != 1:
            raise UsageError(
                f"--ratio-to {text!r} fits {len(fitting)} of the contenders {', '.join(names)}"
            )
        found += fitting
    return tuple(found)


def first_measured(record: Record) -> tuple[str, ...]:
    """What ratios are taken to if nothing else was asked for."""
    return tuple(entry.name for entry in record.contenders if entry.measured)[:1]


def columns(record: Record, ratios_to: Sequence[str], *, detailed: bool) -> list[Column]:
    """What there is to show; stages that nobody has are left out. `detailed`: also percentiles."""
    stages = {stage for entry in record.contenders for stage in spreads(entry)}
    whole = (UNET, END_TO_END) if detailed else ()
    chosen = [
        Column(f"{title} ms", _spread_cell(stage, detailed=stage in whole))
        for stage, title in _PART_TITLES.items()
        if stage in stages
    ]
    rows = record.by_name()
    decisive = END_TO_END if END_TO_END in stages else UNET
    for letter, name in _letters(ratios_to).items():
        for stage in (UNET, END_TO_END):
            if stage in stages:
                title = f"{_PART_TITLES[stage]} / {letter}"
                # A terminal has room for one interval: that of the whole.
                interval = detailed or (len(ratios_to) == 1 and stage == decisive)
                chosen.append(Column(title, _ratio_cell(stage, name, rows, interval=interval)))
    if any(entry.flops for entry in record.contenders):
        if detailed:
            chosen.append(Column("UNet TFLOP", _work_cell))
        if record.ceilings:
            chosen.append(Column("UNet % of peak", _share_cell(record)))
    chosen.append(Column("memory GB", _memory_cell))
    return chosen


def _letters(ratios_to: Sequence[str]) -> dict[str, str]:
    """A, B, ... for the contenders that ratios are taken to: their names would fill the table."""
    return {chr(ord("A") + number): name for number, name in enumerate(ratios_to)}


def _legend(ratios_to: Sequence[str]) -> str:
    if not ratios_to:
        return "Memory: peak of the process"
    named = ", ".join(f"{letter} = {name}" for letter, name in _letters(ratios_to).items())
    if any(name.endswith(ANY) for name in ratios_to):
        named += " (*: in the contender's own runtime and precision)"
    return f"{named}. Ratios of times [95 % interval]; memory: peak of the process"


def rich_table(record: Record, ratios_to: Sequence[str]) -> Table:
    """The table for a terminal."""
    table = Table(
        title=_title(record),
        title_justify="left",
        title_style="bold",
        caption=_legend(ratios_to),
        caption_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    chosen = columns(record, ratios_to, detailed=False)
    for column in chosen:
        # Broken numbers cannot be read, broken titles can.
        longest = max(len(column.cell(entry)) for entry in record.contenders)
        wide = longest > len(column.title)
        table.add_column(column.title, justify="right", overflow="fold", no_wrap=wide)
    for entry in record.contenders:
        if entry.measured:
            table.add_row(escape(entry.name), *(column.cell(entry) for column in chosen))
    return table


def markdown(record: Record, ratios_to: Sequence[str]) -> str:
    """The table with its circumstances; rows that were not measured say why."""
    chosen = columns(record, ratios_to, detailed=True)
    lines = [f"{_title(record)} (p10-p90).", f"{_machine(record)}. {_legend(ratios_to)}.", ""]
    rows = [
        [entry.name, _cell(entry.what), *(column.cell(entry) for column in chosen)]
        if entry.measured
        else [entry.name, _cell(f"not measured: {entry.reason}"), *["-"] * len(chosen)]
        for entry in record.contenders
    ]
    lines += table_lines(["contender", "what", *(column.title for column in chosen)], rows, 2)
    notes = [*record.warnings, *(f"peak {line}" for line in _ceiling_lines(record))]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def standing_warnings(record: Record) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    environment = record.environment
    if environment.is_busy:
        found.append(
            f"the machine was busy when this began (load {environment.load_average[0]:.1f} on "
            f"{environment.cores} cores): times are too long, ratios less exact"
        )
    others = [
        turn.others_cpu
        for entry in record.contenders
        for turn in entry.turns
        if turn.others_cpu is not None
    ]
    if others and max(others) > _OTHERS_LIMIT:
        found.append(f"other processes took up to {max(others):.0%} of the CPU during a turn")
    measured = [entry for entry in record.contenders if entry.facts is not None]
    shas = {e.facts.weights_sha256 for e in measured if e.facts and e.facts.weights_sha256}
    sizes = {(e.facts.size_px, e.facts.batch) for e in measured if e.facts}
    if len(shas) > 1:
        found.append("the contenders do not run the same weights")
    if len(sizes) > 1 and not record.settings.unet_only:
        found.append("the contenders do not draw pictures of one size and batch")
    texts = {e.facts.text_tokens for e in measured if e.facts and e.facts.text_tokens}
    if len(texts) > 1:
        found.append("the contenders do not attend to texts of one length (--max-prompt-tokens)")
    return found


def _title(record: Record) -> str:
    settings = record.settings
    turns = f"{settings.rounds} rounds in turn, {settings.runs} timed runs each"
    sizes = {e.facts.size_px for e in record.contenders if e.facts is not None}
    shown = f"{next(iter(sizes))[0]}x{next(iter(sizes))[1]} px, " if len(sizes) == 1 else ""
    what = "UNet alone, " if settings.unet_only else ""
    return f"Latency: {shown}{what}{turns}; medians"


def _machine(record: Record) -> str:
    environment = record.environment
    memory = "" if not environment.memory_bytes else f", {environment.memory_bytes / 1e9:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages.items())
    return f"{environment.cpu}, {environment.cores} cores{memory}; {versions}"


def _ceiling_lines(record: Record) -> list[str]:
    return [
        f"{precision}: {ceiling.tflops:.2f} TFLOP/s ({ceiling.measured_by})"
        for precision, ceiling in record.ceilings.items()
    ]


def _spread_cell(stage: str, *, detailed: bool) -> Callable[[Measurement], str]:
    def cell(entry: Measurement) -> str:
        value = spreads(entry).get(stage)
        if value is None:
            return "-"
        if not detailed:
            return number(value.median_ms)
        return f"{number(value.median_ms)} ({number(value.p10_ms)}-{number(value.p90_ms)})"

    return cell


def _ratio_cell(
    stage: str, name: str, rows: Mapping[str, Measurement], *, interval: bool
) -> Callable[[Measurement], str]:
    def cell(entry: Measurement) -> str:
        first = denominator(entry, name, rows)
        ratio = ratio_to(entry, first, stage)
        if ratio is None:
            return "-"
        if entry is first:
            return "1"
        return ratio_text(ratio) if interval else f"{ratio.value:.3g}"

    return cell


def _work_cell(entry: Measurement) -> str:
    return f"{entry.flops[UNET] / 1e12:.3g}" if UNET in entry.flops else "-"


def _share_cell(record: Record) -> Callable[[Measurement], str]:
    def cell(entry: Measurement) -> str:
        share = peak_share(entry, record, UNET)
        return "-" if share is None else f"{100 * share:.0f}"

    return cell


def _memory_cell(entry: Measurement) -> str:
    return "-" if entry.peak_memory_bytes is None else f"{entry.peak_memory_bytes / 1e9:.2f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def number(value_ms: float) -> str:
    """Milliseconds to three significant digits, at least to the millisecond from 100 on."""
    return f"{value_ms:.0f}" if value_ms >= 100 else f"{value_ms:.3g}"
