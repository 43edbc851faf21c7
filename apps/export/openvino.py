"""OpenVINO graphs for a bundle, proven in the precision that will run."""

from __future__ import annotations

import functools
import time

from tiue_export.errors import unknown_name
from tiue_export.registry.packages import require
from tiue_export.system.openvino_core import arithmetic_of, native_precisions

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.openvino import OpenvinoForm
from .forms import Form, bundle_of, check_source, make_form, print_form_plan

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
    stages = len(bundle.manifest.graphs) + len(options.precisions)
    make_form(FORM, export, functools.partial(compile_openvino, bundle, options), stages, start)
