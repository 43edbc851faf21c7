"""The form of a backend by its default options, for a bundle or a checkpoint."""

from __future__ import annotations

import functools
import time

from tiue_export.registry.backends import BACKENDS, open_exporter
from tiue_export.registry.packages import require

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from .forms import Form, bundle_of, check_source, make_form, print_form_plan


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
    stages = len(bundle.manifest.graphs) + 1
    make_form(form, export, functools.partial(exporter, bundle), stages, start)
