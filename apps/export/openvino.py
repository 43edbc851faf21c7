"""OpenVINO graphs for a bundle, proven in the precision that will run."""

from __future__ import annotations

import time

from tiue_export.errors import unknown_name
from tiue_export.registry.packages import require
from tiue_export.system.openvino_core import arithmetic_of, native_precisions

from ..commands.openvino import OpenvinoForm
from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..report.next_line import draw_line
from ..report.stages import stage_bar
from ..report.tables import console
from .forms import Form, bundle_of, check_source, form_table, print_form, print_form_plan

FORM = Form("openvino", "OpenVINO", "openvino")


def run(source: SourceOptions, own: OpenvinoForm, export: ExportRequest) -> None:
    """Export first where a checkpoint is given, then convert, prove, and print."""
    check_source(FORM, source, export)
    require("OpenVINO", ("openvino",), "openvino")
    from tiue_export.export.openvino import WEIGHTS, OpenvinoOptions, compile_openvino

    if own.weights not in WEIGHTS:
        raise unknown_name("weights", own.weights, WEIGHTS)
    asked = tuple(arithmetic_of("CPU", precision) for precision in own.precision)
    options = OpenvinoOptions(own.weights, asked or native_precisions())
    start = time.perf_counter()
    bundle = bundle_of(FORM, source, export)
    if bundle is None or export.dry_run:
        settings = {"weights": options.weights, "proven_in": " and ".join(options.precisions)}
        print_form_plan(FORM, bundle, settings, as_json=export.as_json)
        return
    with stage_bar(quiet=export.as_json) as bar:
        bar.expect(len(bundle.manifest.graphs) + len(options.precisions))
        made = compile_openvino(
            bundle,
            options,
            force=export.force,
            allow_parity_loss=export.allow_parity_loss,
            observer=bar.observer(),
        )
    seconds = time.perf_counter() - start
    print_form(FORM, made, form_table(FORM, made), FORM.title, seconds, as_json=export.as_json)
    if not export.as_json:
        console.print(f"next:  {draw_line(made, '--runtime openvino')}", markup=False)
