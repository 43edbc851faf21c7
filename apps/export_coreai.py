"""`tiue-export coreai`: Core AI assets for a bundle, from its checkpoint, run on this machine."""

from __future__ import annotations

import dataclasses
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from tiue_export.bundle.folder import open_bundle, require_one_pass
from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import UsageError
from tiue_export.registry.packages import EXPORT_NEEDS, require

from .export_onnx import ExportRequest, export_first
from .export_openvino import compiled_table
from .report.stages import stage_bar
from .report.tables import console, parity_table, print_json


@dataclass(frozen=True)
class CoreaiRequest:
    """The options of `tiue-export coreai`."""

    ckpt: str | None = None
    bundle: Path | None = None
    out: Path | None = None
    base: str | None = None
    vae: str | None = None
    height: int | None = None
    width: int | None = None
    precision: str = "fp16"
    force: bool = False
    allow_parity_loss: bool = False
    as_json: bool = False


def run(request: CoreaiRequest) -> None:
    """Export the bundle first where there is none, then convert, prove, and print."""
    checkpoint = _checkpoint(request)
    require("Core AI export", ("coreai", "coreai_torch"), "coreai")
    require("exporting", EXPORT_NEEDS, "export")
    check_checkpoint_path(checkpoint)
    from tiue_export.export.coreai import (
        FOLDER,
        CoreaiOptions,
        check_precision,
        compile_coreai,
    )
    from tiue_export.export.own_student import StudentPlace

    check_precision(request.precision)
    start = time.perf_counter()
    path = _bundle_path(request, checkpoint)
    with stage_bar(quiet=request.as_json) as bar:
        opened = open_bundle(path)
        require_one_pass(opened, "coreai")
        bar.expect(len(opened.manifest.graphs) + 1)
        bundle = compile_coreai(
            opened,
            StudentPlace(checkpoint, request.base, request.vae),
            CoreaiOptions(request.precision),
            force=request.force,
            allow_parity_loss=request.allow_parity_loss,
            observer=bar.observer(),
        )
    compiled = bundle.manifest.compiled[FOLDER]
    seconds = round(time.perf_counter() - start, 1)
    if request.as_json:
        print_json({"bundle": str(path), **dataclasses.asdict(compiled), "seconds": seconds})
        return
    console.print(compiled_table(bundle, FOLDER))
    console.print(parity_table(compiled.parity, f"Core AI {compiled.version} against the student"))
    console.print(
        f"[bold green]Done[/] in {seconds:.0f} s. On macOS 27:  "
        f"tiue-export parity {escape(shlex.quote(str(path)))} --runtime coreai",
        highlight=False,
        soft_wrap=True,
    )


def _checkpoint(request: CoreaiRequest) -> str:
    if request.ckpt is None:
        raise UsageError(
            "--ckpt is missing: Core AI reads no ONNX, so assets are made from the student itself, "
            "also for a bundle that is there",
            "tiue-export coreai --ckpt student.safetensors"
            + (f" --bundle {request.bundle}" if request.bundle else "")
            + " (with --base as at the export).",
        )
    return request.ckpt


def _bundle_path(request: CoreaiRequest, checkpoint: str) -> Path:
    if request.bundle is not None:
        given = {"--out": request.out, "--height": request.height, "--width": request.width}
        named = [flag for flag, value in given.items() if value is not None]
        if named:
            raise UsageError(
                f"{', '.join(named)} and --bundle were both given; {request.bundle} has its size",
                "Leave it out, or export anew without --bundle.",
            )
        return request.bundle
    asked = ExportRequest(
        checkpoint,
        request.out,
        base=request.base,
        vae=request.vae,
        height=request.height,
        width=request.width,
        force=request.force,
        as_json=request.as_json,
    )
    out = export_first(asked, f"coreai --ckpt {shlex.quote(checkpoint)} --bundle")
    assert out is not None  # it was no dry run
    return out
