"""A matplotlib figure that leaves matplotlib's global state alone, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of (width, height) inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it as PNG; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
