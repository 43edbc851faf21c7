"""Core AI assets for a bundle, from its checkpoint, run on this machine."""

from __future__ import annotations

import functools
import time

from tiue_export.registry.packages import EXPORT_NEEDS, require

from ..options.checkpoint import StudentSourceOptions
from ..options.coreai import CoreaiForm
from ..options.graphs import ExportRequest
from .forms import OF_A_STUDENT, Form, check_source, make_form, student_bundle_of

FORM = Form("coreai", "Core AI", "coreai", OF_A_STUDENT, device="On macOS 27")


def run(source: StudentSourceOptions, own: CoreaiForm, export: ExportRequest) -> None:
    """Export the bundle first where there is none, then convert, prove, and print."""
    check_source(FORM, source, export)
    require("Core AI export", ("coreai", "coreai_torch"), "coreai")
    require("exporting", EXPORT_NEEDS, "export")
    from tiue_export.export.coreai import CoreaiOptions, check_precision, compile_coreai

    check_precision(own.precision)
    start = time.perf_counter()
    found = student_bundle_of(FORM, source, export, {"precision": own.precision})
    if found is not None:
        make = functools.partial(compile_coreai, *found, CoreaiOptions(own.precision))
        make_form(FORM, export, make, len(found[0].manifest.graphs) + 1, start)
