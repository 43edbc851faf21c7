"""A picture of a benchmark run: one bar per contender, made of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiue_export.proof.latency_change import ratio_text
from tiue_export.proof.latency_record import END_TO_END, UNET, Measurement, Record

from ..figure import new_figure, save_figure
from .summary import Spread, denominator, ratio_to, spreads

# Okabe and Ito's colours: told apart in every kind of colour vision.
_STAGES: tuple[tuple[str, str, str], ...] = (
    ("text_encoder", "text encoder", "#56B4E9"),
    ("unet_encoder", "UNet encoder", "#0072B2"),
    ("unet_decoder", "UNet decoder", "#E69F00"),
    (UNET, "whole UNet passes", "#D55E00"),
    ("vae_decoder", "VAE decoder", "#009E73"),
)
_REST = "#BBBBBB"
_TITLES = (*(title for _, title, _ in _STAGES), "rest")
# Bars more than so many times as long as the median one are cut.
_CUT_AT = 5
_ROW_IN = 0.42


def plot_record(record: Record, ratio_name: str | None, path: Path) -> None:
    """Draw `path` (.png): medians of the stages, p10 to p90 of the whole."""
    shown = [entry for entry in record.contenders if entry.measured]
    figure = new_figure((10, 1.9 + _ROW_IN * max(1, len(shown))))
    axes = figure.subplots()
    _draw(axes, shown, record, ratio_name)
    handles, labels = axes.get_legend_handles_labels()
    order = [labels.index(title) for title in _TITLES if title in labels]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside lower center",
        ncols=len(_TITLES),
        fontsize=8,
        frameon=False,
    )
    save_figure(figure, path)


def _draw(axes: Any, shown: list[Measurement], record: Record, ratio_name: str | None) -> None:
    rows = record.by_name()
    limit_s = _limit_ms([_whole(spreads(entry)) for entry in shown]) / 1e3
    labelled: set[str] = set()
    for row, entry in enumerate(shown):
        known = spreads(entry)
        end_s = _draw_stages(axes, row, known, labelled) / 1e3
        whole = _whole(known)
        low, middle, high = (value / 1e3 for value in (whole.p10_ms, whole.median_ms, whole.p90_ms))
        ratio = None
        first = None if ratio_name is None else denominator(entry, ratio_name, rows)
        if first is not entry:
            ratio = ratio_to(entry, first, _whole_stage(known))
        text = _seconds(whole.median_ms) + ("" if ratio is None else f"   x {ratio_text(ratio)}")
        if middle > limit_s:
            text, white = f"{text}   (bar cut)", {"color": "white", "pad": 1.5, "linewidth": 0}
            axes.text(limit_s * 0.97, row, text, va="center", ha="right", fontsize=8, bbox=white)
            continue
        axes.errorbar(
            middle,
            row,
            xerr=[[middle - low], [high - middle]],
            color="black",
            capsize=3,
            linewidth=1,
        )
        axes.text(max(high, end_s) + limit_s * 0.015, row, text, va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [entry.name for entry in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, limit_s)
    missing = [entry.name for entry in record.contenders if not entry.measured]
    note = f"\nnot measured: {', '.join(missing)}" if missing else ""
    axes.set_xlabel(f"seconds per drawing (median; whiskers p10 to p90){note}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(record, ratio_name), fontsize=10, loc="left")


def _limit_ms(wholes: list[Spread]) -> float:
    """Where the axis ends: bars many times as long as the usual ones are cut, not the others."""
    if not wholes:
        return 1e3
    usual = sorted(whole.median_ms for whole in wholes)[len(wholes) // 2]
    return 1.35 * max(w.p90_ms for w in wholes if w.median_ms <= _CUT_AT * usual)


def _draw_stages(axes: Any, row: int, known: Mapping[str, Spread], labelled: set[str]) -> float:
    """The bar of one contender; what no stage accounts for is grey. Returns its end in ms."""
    left = 0.0
    cut = "unet_encoder" in known
    for stage, title, colour in _STAGES:
        if stage not in known or (stage == UNET and cut):
            continue
        label = None if title in labelled else title
        labelled.add(title)
        width = known[stage].median_ms
        axes.barh(row, width / 1e3, left=left / 1e3, height=0.66, color=colour, label=label)
        left += width
    rest = _whole(known).median_ms - left
    if rest > 0.01 * _whole(known).median_ms:
        label = None if "rest" in labelled else "rest"
        labelled.add("rest")
        axes.barh(row, rest / 1e3, left=left / 1e3, height=0.66, color=_REST, label=label)
        left += rest
    return left


def _whole_stage(known: Mapping[str, Spread]) -> str:
    return END_TO_END if END_TO_END in known else UNET


def _whole(known: Mapping[str, Spread]) -> Spread:
    return known[_whole_stage(known)]


def _seconds(value_ms: float) -> str:
    return f"{value_ms / 1e3:.2f} s" if value_ms >= 1000 else f"{value_ms:.3g} ms"


def _title(record: Record, ratio_name: str | None) -> str:
    environment = record.environment
    text = f"{environment.cpu}, {environment.cores} cores"
    return text if ratio_name is None else f"{text}; x: time over that of {ratio_name}"
