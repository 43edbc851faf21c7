"""HTML of the studio's pages; every value from a bundle or a prompt is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.errors import TiueError
from tiue_export.proof.gates import IDENTICAL_DB
from tiue_export.proof.half_range import load_audit
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER, TensorSpec

from ..inspection import Rows, bundle_facts, compiled_rows, plan_rows
from ..report.tables import island_lines, megabytes
from .choices import Choice, Offer
from .comparison import Comparison, medians
from .drawing import Drawn
from .recovery import Recovered

_STAGE_TITLES = {
    TEXT_ENCODER: "text",
    UNET_ENCODER: "encoder",
    UNET_DECODER: "decoder",
    VAE_DECODER: "VAE",
}


def message(text: str, kind: str = "note") -> str:
    """One line of status; `kind` is note, busy or error."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="tiue-status tiue-{kind}" role="{role}">{escape(text)}</p>'


def problem(error: TiueError) -> str:
    """What went wrong and what to do next."""
    return message(f"{error.message}. {error.next_step or ''}".strip(), "error")


def drawn_line(drawn: Sequence[Drawn], wanted: int, cut: str | None) -> str:
    """How many pictures, on what, the time of the run of the last one, what of a prompt was cut."""
    last = drawn[-1]
    stages = last.stage_latency_ms
    parts = ", ".join(f"{_title(stage)} {_ms(latency)}" for stage, latency in stages.items())
    pictures = f"{len(drawn)} of {wanted} pictures" if wanted > 1 else "1 picture"
    run = f"{_ms(sum(stages.values()))} ms" + (f" for {last.batch}" if last.batch > 1 else "")
    text = (
        f"{pictures} · {run} ({parts}) · {last.parameters['runtime']}, "
        f"{last.parameters['precision']}"
    )
    if cut is not None:
        text += f" · {cut}"
    return message(text)


def recovered_line(recovered: Recovered) -> str:
    """What a picture that was brought back says about itself."""
    known = recovered.parameters
    text = ", ".join(
        f"{name.replace('_', ' ')} {known[name]}"
        for name in ("seed", "size", "model", "precision", "runtime")
        if name in known
    )
    notes = "; ".join(recovered.notes)
    return message(f"Recovered: {text}." + (f" Note: {notes}." if notes else ""))


def comparison_page(found: Comparison) -> str:
    """The verdict in numbers, then a pair of bars for each stage."""
    gate = ""
    if found.gate_db is not None:
        passed = found.latents_psnr_db >= found.gate_db
        gate = f" {_badge(passed)} <small>gate&nbsp;{found.gate_db:.0f}&nbsp;dB</small>"
    cards = (
        ("PSNR of the latents", _decibels(found.latents_psnr_db) + gate),
        ("PSNR of the pictures", _decibels(found.picture_psnr_db)),
        ("largest difference", f"{found.max_levels} <small>of 255 levels</small>"),
    )
    shown = "".join(
        f'<div class="tiue-card"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in cards
    )
    return f'<dl class="tiue-cards">{shown}</dl>{_bars(found)}'


def _bars(found: Comparison) -> str:
    """Median latency per stage of both sides, as bars on one scale."""
    sides = [medians(times) for times in found.latency_ms]
    if not sides[0]:
        return message("Measuring the time of each stage ...", "busy")
    runs = len(next(iter(found.latency_ms[0].values())))
    stages = list(dict.fromkeys([*sides[0], *sides[1]]))
    rows = [(_title(s), [side.get(s) for side in sides]) for s in stages]
    rows.append(("all", [sum(side.values()) for side in sides]))
    longest = max(value for _, values in rows for value in values if value is not None) or 1.0
    lines = []
    for title, values in rows:
        bars = "".join(
            _bar(value, longest, side)
            for side, value in zip(("left", "right"), values, strict=True)
        )
        lines.append(f'<div class="tiue-stage"><span>{escape(title)}</span><div>{bars}</div></div>')
    names = [str(side.parameters["runtime"]) for side in (found.left, found.right)]
    ratio = sum(sides[0].values()) / max(sum(sides[1].values()), 1e-9)
    words = (
        f"right takes {1 / ratio:.2f} times as long"
        if ratio < 1
        else (f"right is {ratio:.2f} times as fast")
    )
    legend = "".join(
        f'<span><i class="tiue-{side}"></i>{side}: {escape(name)}</span>'
        for side, name in zip(("left", "right"), names, strict=True)
    )
    return (
        f'<h3>Latency of each stage, ms</h3><div class="tiue-legend">{legend}</div>'
        f'<div class="tiue-bars">{"".join(lines)}</div>'
        f'<p class="tiue-status">Median of {runs} run{"s" if runs > 1 else ""} in turn, after one '
        f"to warm up; {words}.</p>"
    )


def _bar(value: float | None, longest: float, side: str) -> str:
    if value is None:
        return '<div class="tiue-bar"><b>-</b></div>'
    width = 100 * value / longest
    return (
        f'<div class="tiue-bar"><i class="tiue-{side}" style="width:{width:.1f}%"></i>'
        f"<b>{_ms(value)}</b></div>"
    )


def bundle_page(choice: Choice, offer: Offer) -> str:
    """The manifest as a page: facts, runtimes, graphs, compiled forms, constants, parity."""
    bundle = choice.bundle
    manifest = bundle.manifest
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in bundle_facts(bundle))
    sections = [
        f"<h2>{escape(bundle.root.resolve().name)}</h2>",
        f'<dl class="tiue-facts">{facts}</dl>',
        _section("Runtimes here", _runtimes(choice, offer)),
        _section("Graphs", _graphs(manifest)),
    ]
    if manifest.compiled:
        sections.append(_rows(compiled_rows(manifest)))
    sections.append(_rows(plan_rows(manifest.plan, digits=6)))
    records = [*manifest.parity, *(r for c in manifest.compiled.values() for r in c.parity)]
    sections.append(_section("Parity", _parity(records)))
    audit = load_audit(bundle)
    if audit is not None:
        lines = "".join(f"<li>{escape(line)}</li>" for line in island_lines(audit.graphs))
        sections.append(_section("Half precision", f"<ul>{lines}</ul>"))
    return f'<article class="tiue-bundle">{"".join(sections)}</article>'


def _runtimes(choice: Choice, offer: Offer) -> str:
    root = choice.bundle.root
    rows = [
        (_badge(True, "yes"), escape(c.label), escape(c.device))
        for c in offer.choices
        if c.bundle.root == root
    ]
    rows += [
        (_badge(False, "no"), escape(r.runtime), escape(f"{r.reason}. {r.remedy}".strip()))
        for r in offer.refusals
        if r.bundle == str(root)
    ]
    return _table(("", "runtime", "where, or why not"), rows)


def _graphs(manifest: Manifest) -> str:
    largest = max((graph.size_bytes for graph in manifest.graphs.values()), default=1) or 1
    rows = []
    for name, graph in manifest.graphs.items():
        width = 100 * graph.size_bytes / largest
        size = megabytes(graph.size_bytes) if graph.has_onnx else "no ONNX"
        rows.append(
            (
                f"<code>{escape(name)}</code>",
                f'<div class="tiue-bar"><i class="tiue-left" style="width:{width:.0f}%"></i>'
                f"<b>{size}</b></div>",
                escape(graph.precision + (f", opset {graph.opset}" if graph.has_onnx else "")),
                _tensors(graph.inputs),
                _tensors(graph.outputs),
            )
        )
    return _table(("graph", "size", "precision", "inputs", "outputs"), rows)


def _tensors(specs: Sequence[TensorSpec]) -> str:
    """Names and shapes; a long list is folded."""
    lines = [
        f"<code>{escape(spec.name)}</code> ({', '.join(escape(str(side)) for side in spec.shape)})"
        for spec in specs
    ]
    if len(lines) <= 3:
        return "<br>".join(lines)
    return f"<details><summary>{len(lines)} tensors</summary>{'<br>'.join(lines)}</details>"


def _rows(found: Rows) -> str:
    """What the terminal shows as a table, under its title."""
    head = [str(column.header) for column in found.columns]
    body = _table(head, [tuple(map(escape, row)) for row in found.rows])
    note = f"<p>{escape(found.note)}</p>" if found.note else ""
    return _section(found.title, body + note)


def _parity(records: Iterable[ParityRecord]) -> str:
    rows = []
    for record in records:
        verdict = "reported" if record.gate is None else _badge(record.passed)
        gate = "-" if record.gate is None else f"{record.gate:.0f}"
        cells = (escape(record.hop), escape(record.subject), _decibels(record.value))
        rows.append((*cells, gate, f"{record.max_abs_error:.1e}", verdict))
    return _table(("hop", "what", "PSNR", "gate", "max error", ""), rows)


def _section(title: str, body: str) -> str:
    return f"<section><h3>{escape(title)}</h3>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already; the table scrolls sideways where the page is narrow."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="tiue-scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _badge(passed: bool, word: str | None = None) -> str:
    kind = "good" if passed else "bad"
    return (
        f'<span class="tiue-badge tiue-{kind}">{word or ("passed" if passed else "FAILED")}</span>'
    )


def _decibels(value: float) -> str:
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


def _ms(latency_ms: float) -> str:
    return f"{latency_ms:.1f}" if latency_ms < 10 else f"{latency_ms:,.0f}"


def _title(stage: str) -> str:
    return _STAGE_TITLES.get(stage, stage)
