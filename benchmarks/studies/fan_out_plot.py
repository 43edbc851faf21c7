"""Picture of `--fan-out auto`: what parting late keeps of the latents, against operations."""

from __future__ import annotations

from pathlib import Path

from tiue_export.proof.fan_out_curve import FanOutCurve

from ..figure import new_figure, save_figure

_TOP_DB = 80.0  # where nothing changes the loss is zero, which has no place on the axis


def save_fan_out_plot(curve: FanOutCurve, path: Path, name: str) -> None:
    """PSNR of the latents over the UNet's operations; whole up blocks are marked and named."""
    figure = new_figure((8.0, 5.0))
    axes = figure.subplots()
    gflop = [point.gflop for point in curve.points]
    loss = [_height(point.psnr_db) for point in curve.points]
    target = _height(curve.target_psnr_db)
    axes.plot(gflop, loss, "-", color="#7F7F7F", zorder=1)
    for point, height in zip(curve.points, loss, strict=True):
        whole = not point.fan_out.resnets
        ink = "#D55E00" if point is curve.taken else "#0072B2"
        axes.plot([point.gflop], [height], "o" if whole else ".", color=ink, markersize=8)
        axes.annotate(str(point.fan_out), (point.gflop, height), (4, 5), textcoords="offset points")
    axes.axhline(target, color="#D55E00", linestyle="--", linewidth=1)
    label = f"target {curve.target_psnr_db:g} dB"
    axes.text(max(gflop), target, label, va="bottom", ha="right")
    axes.set(xlabel="GFLOP of encoder and decoder, one picture", ylim=(0, _TOP_DB * 1.08))
    axes.set_ylabel(f"latents against the student's own, dB (capped at {_TOP_DB:g})")
    axes.set_title(f"{name}: rows that part late, {curve.inputs}", fontsize=10)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def _height(psnr_db: float) -> float:
    """Where a loss stands in the picture."""
    return max(0.0, min(psnr_db, _TOP_DB))
