"""Context binaries for Snapdragon in a bundle, one form for each HTP architecture."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from tiue_export.proof.calibration import shipped_prompts
from tiue_export.proof.quantization_plan import read_plan
from tiue_export.registry.packages import require
from tiue_export.system.qnn_provider import NEEDS
from tiue_export.system.snapdragon import SOCS, socs_named

from ..draw.prompt_file import prompts_in
from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.qnn import QnnForm
from ..report.tables import print_json
from .forms import (
    Form,
    bundle_of,
    check_source,
    form_plan,
    form_record,
    made_form,
    print_form,
    print_form_plan,
    to_make,
)

if TYPE_CHECKING:
    from tiue_export.export.qnn.options import QnnOptions

# Latents of the demo student in w8a16 with 4, 16 and 64 prompts: 38.5, 43.1 and 44.0 dB.
_USUAL_PROMPTS = 16


def run(source: SourceOptions, own: QnnForm, export: ExportRequest) -> None:
    """Export first where a checkpoint is given, then compile, prove, and print, chip by chip."""
    socs = socs_named(own.soc, own.htp)
    forms = [_form(soc) for soc in socs]
    check_source(forms[0], source, export)
    require("compiling for Snapdragon", NEEDS, "qnn")
    from tiue_export.export.qnn.bundle import compile_qnn
    from tiue_export.export.qnn.options import NOTHING

    options = [_options(own, soc) for soc in socs]  # refused before any work
    start = time.perf_counter()
    bundle = bundle_of(forms[0], source, export)
    if bundle is None or export.dry_run:
        plans = {
            form: {"for": f"{SOCS[soc].title} (HTP {SOCS[soc].htp})", "precision": own.precision}
            for soc, form in zip(socs, forms, strict=True)
        }
        if bundle is not None and export.as_json:
            print_json({"forms": [form_plan(form, bundle, plans[form]) for form in forms]})
            return
        for form, settings in plans.items():
            print_form_plan(form, bundle, settings, as_json=export.as_json)
        return
    records = {}
    for each, form in zip(options, forms, strict=True):
        begun = time.perf_counter()
        make = functools.partial(compile_qnn, bundle, each)
        # Each graph is made, or was by a run that failed later; before them prompts may be drawn,
        # after them all is proven at once.
        graphs = to_make(form, bundle, force=export.force)
        stages = len(graphs) + each.format.quantized + (each.prove != NOTHING)
        bundle = made_form(export, make, stages)
        records[form.folder] = form_record(form, bundle)
        if not export.as_json:
            print_form(form, bundle, time.perf_counter() - begun)
    if export.as_json:
        seconds = round(time.perf_counter() - start, 1)
        print_json({"bundle": str(bundle.root), "forms": records, "seconds": seconds})


def _options(own: QnnForm, soc: str) -> QnnOptions:
    """The options in the words of the export; files that they name are read."""
    from tiue_export.export.qnn.number_formats import format_named
    from tiue_export.export.qnn.options import QnnOptions

    prompts = tuple(prompts_in(own.calibration_prompts, "--calibration-prompts"))
    if not prompts and format_named(own.precision).quantized:
        prompts = shipped_prompts()[:_USUAL_PROMPTS]
    plan = None if own.plan is None else read_plan(own.plan)
    return QnnOptions(soc, own.optimization, own.precision, prompts, plan, own.prove)


def _form(soc: str) -> Form:
    from tiue_export.export.qnn.options import folder_of

    chip = SOCS[soc]
    return Form(
        "qnn",
        f"{chip.title} (HTP {chip.htp})",
        folder_of(soc),
        proof="Qualcomm's emulator of SDK",
        remark="The emulator proves numbers; how fast they come, the device says.",
        device=f"On {chip.title}",
    )
