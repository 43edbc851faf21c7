"""`--fan-out auto`: what parting late costs this student, measured, told, and the place to take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.registry.spokes import save_fan_out_plot
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.progress import Observer, stage

from ..options.graphs import GraphOptions
from ..report.tables import fixed, numbers, titled

if TYPE_CHECKING:
    from tiue_export.graphs.options import ExportOptions
    from tiue_export.proof.fan_out_curve import FanOutCurve
    from tiue_export.student.model import Student

_ENDINGS = (".png", ".json")
_BAR_WIDTH = 30


def check_fan_out(request: GraphOptions) -> None:
    """Refuse, before the model is read, a fan-out or a file for its curve that cannot be."""
    request.given_fan_out()
    path = request.fan_out_curve
    if path is None:
        return
    if path.suffix not in _ENDINGS or path.is_dir():
        raise UsageError(
            f"--fan-out-curve is {path}; expected a file that ends in {' or '.join(_ENDINGS)}",
            "Give it such a name.",
        )
    if path.suffix == ".png":
        require("a picture of the curve", ("matplotlib",), "bench")


def measured_fan_out(
    student: Student, options: ExportOptions, request: GraphOptions, observer: Observer
) -> tuple[Student, ExportOptions, FanOutCurve | None]:
    """With `--fan-out auto` the student that says what chose, the options with the deepest place
    that keeps the target, and the curve, which is written where it was asked for.

    Else what was given, and no curve.
    """
    if (target_psnr_db := request.fan_out_target_db) is None:
        return student, options, None
    from tiue_export.checkpoint.tokenizer_files import tokenizer_of
    from tiue_export.graphs.shapes import shapes_of
    from tiue_export.reference.fan_out_loss import fan_out_curve

    folder, shapes = student.tokenizer_folder, shapes_of(student, options)
    tokenizer = None if folder is None else tokenizer_of(folder, shapes.tokens, shapes.text_chunks)
    with stage(observer, name := "measure fan-out"):
        told = observer.steps_of(name)
        curve = fan_out_curve(student, options, tokenizer, target_psnr_db, told)
    if request.fan_out_curve is not None:
        _write_curve(curve, request.fan_out_curve, student.source.name)
    how = f"auto, at least {curve.target_psnr_db:g} dB on {curve.inputs}"
    student = student.by_plan(dataclasses.replace(student.plan, chosen_by=how))
    return student, dataclasses.replace(options, fan_out=curve.taken.fan_out), curve


def _write_curve(curve: FanOutCurve, path: Path, name: str) -> None:
    """As its ending says: a picture, or JSON."""
    if path.suffix == ".png":
        save_fan_out_plot(curve, path, name)
        return
    text = json.dumps(curve_facts(curve), indent=2) + "\n"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def curve_facts(curve: FanOutCurve) -> dict[str, object]:
    """The curve as JSON tells it; a fan-out is spelled as on the command line."""
    points = [
        {"fan_out": str(p.fan_out), "gflop": round(p.gflop, 3), "psnr_db": round(p.psnr_db, 2)}
        for p in curve.points
    ]
    return {
        "inputs": curve.inputs,
        "target_psnr_db": curve.target_psnr_db,
        "taken": str(curve.taken.fan_out),
        "points": points,
    }


def curve_table(curve: FanOutCurve) -> Table:
    """Operations and latents at each place, with bars; the one that is taken is marked."""
    most = curve.points[0].gflop
    columns = (
        *fixed("fan-out"),
        *numbers("GFLOP", "of the first", "latents"),
        *fixed("operations"),
    )
    table = titled("Rows that part late", *columns, "")
    for point in curve.points:
        share = point.gflop / most
        table.add_row(
            str(point.fan_out),
            f"{point.gflop:.4g}",
            f"{share:.2f}",
            f"{point.psnr_db:.1f} dB",
            "█" * round(share * _BAR_WIDTH),
            f"taken: keeps {curve.target_psnr_db:g} dB" if point is curve.taken else "",
        )
    table.caption = f"against the student's own latents, on {curve.inputs}; no training"
    return table
