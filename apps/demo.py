"""`tiue-export demo`: the whole way in a minute, offline: student, bundle, proof, picture."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from tiue_export.errors import BundleError
from tiue_export.registry import EXPORT_NEEDS, require

from .export_onnx import ExportRequest
from .export_onnx import run as export_onnx
from .generate import GenerateRequest
from .generate import run as generate
from .tables import console, print_json

PROMPT = "a red fox in fresh snow"
_MARK = ".tiue-export-demo"


def run(out: Path, force: bool, as_json: bool = False) -> None:
    """Make everything below `out`; a folder that the demo did not make is left alone.

    With `as_json` the story goes to standard error, and one object follows on standard output.
    """
    if not as_json:
        _tell(out, force)
        return
    with contextlib.redirect_stdout(sys.stderr):
        seconds = _tell(out, force)
    print_json(
        {
            "student": str(out / "student"),
            "bundle": str(out / "bundle"),
            "picture": str(out / "picture.png"),
            "prompt": PROMPT,
            "seconds": round(seconds, 1),
        }
    )


def _tell(out: Path, force: bool) -> float:
    """The demo itself; returns the seconds it took."""
    require("the demo", EXPORT_NEEDS, "export")
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise BundleError(f"{out} exists and was not made by the demo", "Choose another --out.")
        if not force:
            raise BundleError(f"{out} holds an earlier demo", "Pass --force to make it again.")
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()
    console.print("[bold]1. a tiny student[/] (random weights: the picture will be abstract)")
    checkpoint = demo_checkpoint(out / "student")
    console.print(f"   {checkpoint}\n", markup=False)
    bundle = out / "bundle"
    console.print("[bold]2. export and proof[/]  tiue-export onnx --precision fp32")
    export_onnx(ExportRequest(str(checkpoint), bundle, precision="fp32", force=True))
    console.print("\n[bold]3. a picture, without torch[/]")
    picture = out / "picture.png"
    generate(GenerateRequest(bundle, (PROMPT,), out=picture, time_stages=True, force=True))
    seconds = time.perf_counter() - start
    console.print(f"\n[bold green]Done in {seconds:.0f} s.[/] Next:")
    for line in (
        f"tiue-export inspect {bundle}                # graphs, constants, parity",
        f'tiue-export generate {bundle} "an owl" --count 4',
        f"tiue-export parity {bundle}                 # prove the runtime on this machine",
        "tiue-export onnx --ckpt YOUR_STUDENT        # a real one",
    ):
        console.print("  " + line, markup=False, highlight=False)
    return seconds


def demo_checkpoint(folder: Path) -> Path:
    """The student of the demo: the one place that decides where it comes from."""
    from tiue_export.synthetic import write_synthetic_pipeline

    return write_synthetic_pipeline(folder, "tiny")
