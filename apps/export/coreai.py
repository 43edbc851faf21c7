"""Core AI assets for a bundle, from its checkpoint, run on this machine."""

from __future__ import annotations

import time

from tiue_export.registry.packages import EXPORT_NEEDS, require

from ..commands.coreai import CoreaiForm
from ..options.checkpoint import StudentSourceOptions
from ..options.graphs import ExportRequest
from ..report.stages import stage_bar
from .forms import (
    Form,
    check_source,
    form_table,
    named_bundle,
    print_done,
    print_form,
    print_form_plan,
    student_bundle_of,
)

_OF_THE_STUDENT = ("base", "vae", "lora")
FORM = Form("coreai", "Core AI", "coreai", (*Form.usable, *_OF_THE_STUDENT))


def run(source: StudentSourceOptions, own: CoreaiForm, export: ExportRequest) -> None:
    """Export the bundle first where there is none, then convert, prove, and print."""
    check_source(FORM, source, export)
    require("Core AI export", ("coreai", "coreai_torch"), "coreai")
    require("exporting", EXPORT_NEEDS, "export")
    from tiue_export.export.coreai import CoreaiOptions, check_precision, compile_coreai

    check_precision(own.precision)
    start = time.perf_counter()
    settings = {"precision": own.precision}
    if export.dry_run and source.bundle is not None:
        print_form_plan(FORM, named_bundle(FORM, source), settings, as_json=export.as_json)
        return
    found = student_bundle_of(FORM, source, export, lambda bundle, student: None)
    if found is None:
        print_form_plan(FORM, None, settings, as_json=export.as_json)
        return
    bundle, student = found
    with stage_bar(quiet=export.as_json) as bar:
        bar.expect(len(bundle.manifest.graphs) + 1)
        made = compile_coreai(
            bundle,
            student,
            CoreaiOptions(own.precision),
            force=export.force,
            allow_parity_loss=export.allow_parity_loss,
            observer=bar.observer(),
        )
    seconds = time.perf_counter() - start
    print_form(FORM, made, form_table(FORM, made), FORM.title, seconds, as_json=export.as_json)
    if not export.as_json:
        print_done(made, seconds, "On macOS 27", "coreai")
