"""`tiue-export parity`: does this runtime, on this machine, still draw what the student draws?"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tiue_export.bundle.read import open_bundle
from tiue_export.proof.parity import (
    load_reference,
    measure_constants,
    measure_runtime,
    require_passed,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import Placed, RuntimeOptions

from .report.stages import step_bar
from .report.tables import console, parity_table, placement_table, print_json


def run(path: Path, runtime_name: str, options: RuntimeOptions, as_json: bool) -> None:
    """Measure, print, and end with exit code 7 if a gate fails."""
    bundle = open_bundle(path, anew=True)
    reference = load_reference(bundle)
    runtime = open_runtime(runtime_name, bundle, options)
    try:
        with step_bar(shown=not bundle.manifest.plan.one_pass and not as_json) as on_step:
            records = measure_constants(bundle, reference)
            records += measure_runtime(bundle, runtime, reference, on_step)
        placement = runtime.placement() if isinstance(runtime, Placed) and not as_json else {}
    finally:
        runtime.close()
    if as_json:
        print_json([{**dataclasses.asdict(r), "passed": r.passed} for r in records])
    else:
        console.print(parity_table(records, f"{path} against its fp32 student"))
        if placement:
            console.print(placement_table(placement))
    require_passed(records, "Its pictures cannot be trusted: try another --device or --runtime.")
