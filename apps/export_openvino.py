"""`tiue-export openvino`: OpenVINO graphs for a bundle, proven in the precision that will run."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.folder import Bundle, open_bundle
from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.system.openvino_core import native_precisions

from .export_onnx import ExportRequest, export_first
from .method_options import MethodRequest
from .report.next_line import draw_line
from .report.stages import stage_bar
from .report.tables import console, megabytes, parity_table, print_json


@dataclass(frozen=True)
class OpenvinoRequest:
    """The options of `tiue-export openvino`: a checkpoint, or a bundle that is there."""

    ckpt: str | None = None
    bundle: Path | None = None
    out: Path | None = None
    base: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    method: MethodRequest = field(default_factory=MethodRequest)
    weights: str = "fp32"
    precisions: tuple[str, ...] = ()
    force: bool = False
    allow_parity_loss: bool = False
    as_json: bool = False


def run(request: OpenvinoRequest) -> None:
    """Export first where a checkpoint is given, then convert, prove, and print."""
    if (request.ckpt is None) == (request.bundle is None):
        raise UsageError(
            "give a checkpoint or a bundle, one of them",
            "tiue-export openvino --ckpt student.safetensors, or --bundle BUNDLE.",
        )
    request.method.check()
    if request.bundle is not None:
        _refuse_export_options(request)
    require("OpenVINO", ("openvino",), "openvino")
    from tiue_export.export.openvino import FOLDER, OpenvinoOptions, compile_openvino

    start = time.perf_counter()
    path = _bundle_path(request)
    with stage_bar(quiet=request.as_json) as bar:
        options = OpenvinoOptions(request.weights, request.precisions or native_precisions())
        bundle = compile_openvino(
            open_bundle(path),
            options,
            force=request.force,
            allow_parity_loss=request.allow_parity_loss,
            observer=bar.observer(),
        )
    compiled = bundle.manifest.compiled[FOLDER]
    if request.as_json:
        seconds = round(time.perf_counter() - start, 1)
        record = {"bundle": str(path), **dataclasses.asdict(compiled), "seconds": seconds}
        print_json(record)
        return
    console.print(compiled_table(bundle, FOLDER))
    console.print(parity_table(compiled.parity, f"OpenVINO {compiled.version} against the student"))
    console.print(f"next:  {draw_line(bundle, '--runtime openvino')}", markup=False)


def _refuse_export_options(request: OpenvinoRequest) -> None:
    """What decides the graphs was decided when the bundle was made."""
    method = request.method
    given = {
        "--height": request.height is not None,
        "--width": request.width is not None,
        "--steps": request.steps is not None,
        "--method": method != MethodRequest(),
    }
    named = [flag for flag, was_given in given.items() if was_given]
    if named:
        raise UsageError(
            f"{', '.join(named)} and what belongs to it are for --ckpt; {request.bundle} has its "
            "graphs already",
            "Leave it out, or export from the checkpoint.",
        )


def _bundle_path(request: OpenvinoRequest) -> Path:
    if request.bundle is not None:
        return request.bundle
    assert request.ckpt is not None
    asked = ExportRequest(
        request.ckpt,
        request.out,
        base=request.base,
        vae=request.vae,
        height=request.height,
        width=request.width,
        steps=request.steps,
        method=request.method,
        force=request.force,
        as_json=request.as_json,
    )
    out = export_first(asked, "openvino --bundle")
    assert out is not None  # it was no dry run
    return out


def compiled_table(bundle: Bundle, folder: str) -> Table:
    """Each graph of a compiled form with its size, and what making it took."""
    table = Table(title=escape(f"{bundle.root}/{folder}"), title_justify="left")
    table.add_column("graph")
    for column in ("size", "convert s", "peak memory"):
        table.add_column(column, justify="right")
    for graph, form in bundle.manifest.compiled[folder].graphs.items():
        size_bytes = sum(record.size_bytes for record in form.files.values())
        table.add_row(
            graph,
            megabytes(size_bytes),
            f"{form.report['convert_s']:.1f}",
            megabytes(float(form.report["peak_memory_bytes"])),
        )
    return table
