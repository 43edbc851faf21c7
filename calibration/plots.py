"""Pictures of an analysis: which layers lose most, and what quality costs in int8 operations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiue_export.proof.quantization import Point
from tiue_export.proof.quantization_plan import W8A8, QuantizationPlan
from tiue_export.registry.packages import require
from tiue_export.specs import UNET_ENCODER
from tiue_export.system.disk_errors import disk_errors

_MOST_BARS = 60
_COLOURS = {True: "#3b6ea5", False: "#c0632b"}  # encoder, decoder


def save_quantization_plots(
    plan: QuantizationPlan, curve: Sequence[Point], folder: Path
) -> list[Path]:
    """Write sensitivity.png into `folder`, and int8-share.png where sets were measured."""
    paths = [_plot_sensitivity(plan, folder / "sensitivity.png")]
    if curve:
        paths.append(_plot_curve(plan, curve, folder / "int8-share.png"))
    return paths


def _plot_sensitivity(plan: QuantizationPlan, path: Path) -> Path:
    """Bars: PSNR of the latents with one layer alone in int8, the worst first."""
    units = {
        (layer.graph, layer.unit or layer.name): layer
        for layer in plan.layers
        if layer.psnr_db is not None
    }
    measured = sorted(units.items(), key=lambda entry: entry[1].psnr_db or 0.0)
    worst = [layer for _, layer in measured[:_MOST_BARS]]
    labels = [name.rsplit("/", 1)[0] for (_, name), _ in measured[:_MOST_BARS]]
    figure, axes = _figure(9, 1.2 + 0.16 * len(worst))
    values = [layer.psnr_db or 0.0 for layer in worst]
    colours = [_COLOURS[layer.graph == UNET_ENCODER] for layer in worst]
    bars = axes.barh(range(len(worst)), values, color=colours)
    for bar, layer in zip(bars, worst, strict=True):
        bar.set_alpha(1.0 if layer.mode == W8A8 else 0.4)
    axes.set_yticks(range(len(worst)), labels, fontsize=6)
    axes.set_ylim(len(worst) - 0.4, -0.6)
    if values:
        axes.set_xlim(min(values) - 3, max(values) + 3)
    axes.axvline(plan.target_psnr_db, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("PSNR of the latents with this alone in int8, dB (less is worse)")
    title = (
        f"{len(worst)} of {len(measured)} measured; blue encoder, orange decoder, pale: in float"
    )
    axes.set_title(title, fontsize=9)
    return _save(figure, path)


def _plot_curve(plan: QuantizationPlan, points: Sequence[Point], path: Path) -> Path:
    """Measured sets of layers: share of operations in int8 against the latents' PSNR."""
    figure, axes = _figure(6, 4)
    ordered = sorted(points, key=lambda point: point.int8_share)
    shares = [100 * point.int8_share for point in ordered]
    axes.plot(shares, [point.psnr_db for point in ordered], "o-", color=_COLOURS[True])
    axes.axhline(plan.target_psnr_db, color="black", linewidth=0.8, linestyle=":")
    axes.axvline(100 * plan.int8_share, color=_COLOURS[False], linewidth=0.8)
    axes.set_xlabel("operations in int8, % of the UNet (attention's products stay in float)")
    axes.set_ylabel("PSNR of the latents, dB")
    axes.set_title(f"target {plan.target_psnr_db:g} dB, chosen {plan.int8_share:.0%}", fontsize=9)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    require("plots", ("matplotlib",), "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path
