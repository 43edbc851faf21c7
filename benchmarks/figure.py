"""A matplotlib figure that leaves matplotlib's global state alone, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.system.disk_errors import disk_errors


def check_plot(path: Path | None) -> None:
    """Refuse before the work what `--plot` could not write after it; None asks for nothing."""
    if path is None:
        return
    require("--plot", ("matplotlib",), "bench")
    check_file("--plot", path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path} is no .png file", "Give it the ending .png.")


def check_file(option: str, path: Path | None) -> None:
    """Refuse a folder where a file is to be written."""
    if path is not None and path.is_dir():
        raise UsageError(f"{option} {path} is a folder", "Give the name of a file.")


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of (width, height) inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write it in the format of its ending; missing folders are made."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
