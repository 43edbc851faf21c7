"""`tiue-export demo`: the whole way in a minute, offline: student, bundle, proof, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path

from tiue_export.bundle.read import open_bundle
from tiue_export.checkpoint.demo_student import NAME, demo_student
from tiue_export.errors import BundleError
from tiue_export.registry.packages import EXPORT_NEEDS, require
from tiue_export.system.command_line import command_line

from .draw.generate import run as generate
from .export.onnx import export_checkpoint, print_exported
from .options.generate import DrawOptions
from .options.graphs import ExportRequest
from .report.tables import console, print_json

PROMPTS = (
    "a red apple",
    "a fox on a dark green background",
    "a mushroom on a dark blue background",
    "a panda on a light green background",
)
SEEDS = 4
_MARK = ".tiue-export-demo"


def run(out: Path, force: bool, as_json: bool = False) -> None:
    """Make everything below `out`; a folder that the demo did not make is left alone.

    With `as_json` the story goes to standard error, and one object follows on standard output.
    """
    if not as_json:
        _tell(out, force)
        return
    with contextlib.redirect_stdout(sys.stderr):
        facts = _tell(out, force)
    print_json(facts)


def _tell(out: Path, force: bool) -> dict[str, object]:
    """The demo itself; returns what was made, what it proved and how long it took."""
    require("the demo", EXPORT_NEEDS, "export")
    student = demo_student()
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise BundleError(f"{out} exists and was not made by the demo", "Choose another --out.")
        if not force:
            raise BundleError(f"{out} holds an earlier demo", "Pass --force to make it again.")
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    bundle, sheet = out / "bundle", out / "sheet.png"
    console.print("[bold]1. export and proof[/]  tiue-export onnx --ckpt demo")
    console.print(f"   a trained student of 128 px: {student}\n", markup=False)
    exported = export_checkpoint(NAME, ExportRequest(out=bundle, force=True), "fp32")
    assert exported is not None  # it was no dry run
    print_exported(exported, as_json=False, is_last=False)
    console.print(f"\n[bold]2. {len(PROMPTS) * SEEDS} pictures, without torch[/]")
    drawn = generate(
        DrawOptions(
            bundle,
            PROMPTS,
            count=SEEDS,
            out=out / "pictures",
            sheet=sheet,
            time_stages=True,
            force=True,
        )
    )
    seconds = time.perf_counter() - start
    console.print(f"\n[bold green]Done in {seconds:.0f} s.[/] Look at {sheet}. Next:")
    for line in (
        f"{command_line('studio', bundle)} --open          # draw while you type, in the browser",
        f'{command_line("generate", bundle)} "a penguin" --count 4',
        f"{command_line('inspect', bundle)}                # graphs, constants, parity",
        f"{command_line('parity', bundle)}                 # prove the runtime on this machine",
        "tiue-export onnx --ckpt YOUR_STUDENT        # a real one",
    ):
        console.print("  " + line, markup=False, highlight=False)
    return {
        "student": str(student),
        "bundle": str(bundle),
        "sheet": str(sheet),
        "pictures": drawn["pictures"],
        "parity": [dataclasses.asdict(record) for record in open_bundle(bundle).manifest.parity],
        "stage_latency_ms": drawn["stage_latency_ms"],
        "seconds": round(seconds, 1),
    }
