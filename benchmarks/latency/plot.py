"""A picture of a benchmark run: one bar per contender, made of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiue_export.bundle import disk_errors

from .record import END_TO_END, UNET, Measurement, Record
from .report import ratio_text
from .summary import Spread, ratio_to, spreads

# Okabe and Ito's colours: told apart in every kind of colour vision.
_STAGES: tuple[tuple[str, str, str], ...] = (
    ("text_encoder", "text encoder", "#56B4E9"),
    ("unet_encoder", "UNet encoder", "#0072B2"),
    ("unet_decoder", "UNet decoder", "#E69F00"),
    (UNET, "whole UNet passes", "#D55E00"),
    ("vae_decoder", "VAE decoder", "#009E73"),
)
_REST = "#BBBBBB"
_ROW_IN = 0.42


def plot_record(record: Record, ratio_name: str | None, path: Path) -> None:
    """Draw `path` (.png, .svg or .pdf): medians of the stages, p10 to p90 of the whole."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [entry for entry in record.contenders if entry.measured]
    height = 1.9 + _ROW_IN * max(1, len(shown))
    figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
    try:
        _draw(axes, shown, record, ratio_name)
        if shown:
            figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)


def _draw(axes: Any, shown: list[Measurement], record: Record, ratio_name: str | None) -> None:
    first = record.by_name().get(ratio_name or "")
    labelled: set[str] = set()
    longest = max((_whole(spreads(entry)).p90_ms for entry in shown), default=1.0)
    for row, entry in enumerate(shown):
        known = spreads(entry)
        left = _draw_stages(axes, row, known, labelled)
        whole = _whole(known)
        error = [[whole.median_ms - whole.p10_ms], [whole.p90_ms - whole.median_ms]]
        axes.errorbar(
            whole.median_ms / 1e3,
            row,
            xerr=[[value[0] / 1e3] for value in error],
            color="black",
            capsize=3,
            linewidth=1,
        )
        ratio = None
        if first is not None and entry is not first:
            ratio = ratio_to(entry, first, _whole_stage(known))
        text = _seconds(whole.median_ms) + ("" if ratio is None else f"   x {ratio_text(ratio)}")
        place = max(whole.p90_ms, left) / 1e3 + longest / 1e3 * 0.015
        axes.text(place, row, text, va="center", fontsize=8, color="#222222")
    axes.set_yticks(range(len(shown)), [entry.name for entry in shown], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, longest / 1e3 * 1.3)
    missing = [entry.name for entry in record.contenders if not entry.measured]
    note = f"\nnot measured: {', '.join(missing)}" if missing else ""
    axes.set_xlabel(f"seconds per drawing (median; whiskers p10 to p90){note}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_title(record, ratio_name), fontsize=10, loc="left")


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
