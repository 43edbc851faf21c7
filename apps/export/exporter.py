"""The form of a backend by its default options, for a bundle or a checkpoint."""

from __future__ import annotations

import time

from tiue_export.registry.backends import BACKENDS, open_exporter
from tiue_export.registry.packages import require

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..report.next_line import draw_line
from ..report.stages import stage_bar
from ..report.tables import console
from .forms import Form, bundle_of, check_source, form_table, print_form, print_form_plan


def run(backend: str, source: SourceOptions, export: ExportRequest) -> None:
    """Export first where a checkpoint is given, then convert, prove, and print."""
    entry = BACKENDS[backend]
    form = Form(backend, entry.title, entry.folders[0])
    check_source(form, source, export)
    require(entry.title, (*entry.needs, *entry.export_needs), entry.extra)
    exporter, start = open_exporter(backend), time.perf_counter()
    bundle = bundle_of(form, source, export)
    if bundle is None or export.dry_run:
        print_form_plan(form, bundle, {}, as_json=export.as_json)
        return
    with stage_bar(quiet=export.as_json) as bar:
        made = exporter(
            bundle,
            force=export.force,
            allow_parity_loss=export.allow_parity_loss,
            observer=bar.observer(),
        )
    seconds = time.perf_counter() - start
    print_form(form, made, form_table(form, made), entry.title, seconds, as_json=export.as_json)
    if not export.as_json:
        console.print(f"next:  {draw_line(made, f'--runtime {backend}')}", markup=False)
