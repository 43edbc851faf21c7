"""Core ML packages for a bundle, from its checkpoint, each proven on this machine."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.read import Bundle
from tiue_export.export.coreml.profiles import (
    CoremlOptions,
    CoremlPlan,
    check_loop,
    plan_coreml,
    size_named,
)
from tiue_export.registry.packages import EXPORT_NEEDS, require

from ..commands.coreml import CoremlForm
from ..draw.prompt_file import prompts_in
from ..options.checkpoint import StudentSourceOptions
from ..options.graphs import ExportRequest
from ..options.group import given, picked, refuse
from ..report.stages import stage_bar
from ..report.tables import console, fixed, megabytes, numbers, titled
from .forms import (
    Form,
    check_source,
    named_bundle,
    print_done,
    print_form,
    print_form_plan,
    student_bundle_of,
)

_OF_THE_STUDENT = ("base", "vae", "lora")
FORM = Form("coreml", "Core ML", "coreml", (*Form.usable, *_OF_THE_STUDENT))


def run(source: StudentSourceOptions, own: CoremlForm, export: ExportRequest) -> None:
    """Export the bundle first where there is none, then convert, prove, and print."""
    options = coreml_options(own)
    plan = plan_coreml(options)
    if options.sizes:
        refuse(
            "for one size, and --size was given too",
            "Give every size as --size HEIGHTxWIDTH.",
            export,
            only=("height", "width"),
        )
    check_source(FORM, source, export)
    require("Core ML export", ("coremltools", "sklearn"), "coreml")
    require("exporting", EXPORT_NEEDS, "export")
    if export.plans_passes():
        check_loop(options)
    from tiue_export.export.coreml.bundle import check_coreml, compile_coreml

    start = time.perf_counter()
    if export.dry_run and source.bundle is not None:
        _print_plan(plan, named_bundle(FORM, source), export)
        return
    check = functools.partial(check_coreml, options=options)
    found = student_bundle_of(FORM, source, _of_the_bundle(export, options), check)
    if found is None:
        _print_plan(plan, None, export)
        return
    bundle, student = found
    with stage_bar(quiet=export.as_json) as bar:
        searched = options.target_psnr_db is not None or options.target_mb is not None
        bar.expect(len(bundle.manifest.graphs) + searched)
        made = compile_coreml(
            bundle,
            student,
            options,
            force=export.force,
            allow_parity_loss=export.allow_parity_loss,
            observer=bar.observer(),
        )
    seconds = time.perf_counter() - start
    print_form(FORM, made, package_table(made), "coremltools", seconds, as_json=export.as_json)
    if not export.as_json:
        console.print(
            "Proven: the packages, executed by tiue-export's own evaluator. Not proven: how a GPU "
            "or a Neural Engine rounds.",
            soft_wrap=True,
        )
        print_done(made, seconds, "On the Mac", "coreml")


def _print_plan(plan: CoremlPlan, bundle: Bundle | None, export: ExportRequest) -> None:
    names = ("profile", "target", "attention", "linear", "precision", "compress")
    settings = {name: getattr(plan, name) for name in names}
    print_form_plan(FORM, bundle, settings, as_json=export.as_json)


def coreml_options(own: CoremlForm) -> CoremlOptions:
    """The options in the words of the export; files that they name are read."""
    recipe: dict[str, dict[str, int]] = {}
    if own.recipe is not None:
        require("reading a recipe", EXPORT_NEEDS, "export")
        from tiue_export.export.coreml.recipe import read_recipe

        recipe = {graph: dict(bits) for graph, bits in read_recipe(own.recipe).items()}
    return picked(
        CoremlOptions,
        own,
        sizes=tuple(map(size_named, own.size)),
        target_psnr_db=own.target_psnr,
        recipe=recipe,
        prompts=tuple(prompts_in(own.calibration_prompts, "--calibration-prompts")),
    )


def _of_the_bundle(export: ExportRequest, options: CoremlOptions) -> ExportRequest:
    """The export of the bundle itself: of the first size, and a loop's shared part computed once.

    A package of few steps would compute that part again for each of its runs.
    """
    if options.sizes:
        height, width = options.sizes[0]
        export = replace(export, height=height, width=width)
    if export.plans_passes() and not given(export, only=("hoist_into", "no_hoist")):
        export = replace(export, hoist_into="encoder")
    return export


def package_table(bundle: Bundle) -> Table:
    """Each package with its size, operations and largest activation."""
    compiled = bundle.manifest.compiled[FORM.folder]
    flags = compiled.flags
    title = (
        f"{bundle.root}/{FORM.folder}: {flags['profile']}, {flags['target']}, "
        f"{flags['attention']}, {flags['linear']}, decoder batch {flags['decoder_batch']}, "
        f"{flags['compute_unit']}"
    )
    measured = numbers("size", "max |x|", "ops", "convert s", "prove s", "peak memory")
    table = titled(title, *fixed("package"), "weights in", *measured, "most frequent")
    for graph, form in compiled.graphs.items():
        report = form.report
        islands = int(report["float32_ops"])
        table.add_row(
            graph,
            str(report["compression"]).replace("none", str(flags["precision"]))
            + (f", {islands} ops in fp32" if islands else ""),
            megabytes(float(report["size_bytes"])),
            f"{float(report['max_abs_activation']):.4g}",
            str(report["ops"]),
            f"{float(report['convert_s']):.1f}",
            f"{float(report['verify_s']):.1f}",
            megabytes(float(report["peak_memory_bytes"])),
            escape(str(report["most_frequent_ops"])),
        )
    return table
