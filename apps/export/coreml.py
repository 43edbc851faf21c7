"""Core ML packages for a bundle, from its checkpoint, each proven on this machine."""

from __future__ import annotations

import functools
import time
from dataclasses import fields, replace

from rich.table import Table

from tiue_export.bundle.read import Bundle
from tiue_export.errors import ParityError
from tiue_export.export.coreml.profiles import (
    CoremlOptions,
    check_loop,
    gentler,
    plan_coreml,
    size_named,
)
from tiue_export.registry.packages import EXPORT_NEEDS, require
from tiue_export.system.command_line import command_line

from ..draw.prompt_file import prompts_in
from ..options.checkpoint import StudentSourceOptions
from ..options.coreml import CoremlForm
from ..options.graphs import ExportRequest
from ..options.group import given, picked, refuse, typed
from ..report.tables import fixed, megabytes, numbers, titled
from .forms import OF_A_STUDENT, Form, check_source, make_form, student_bundle_of

FORM = Form(
    "coreml",
    "Core ML",
    "coreml",
    OF_A_STUDENT,
    proof="coremltools",
    remark="Proven: the packages, executed by tiue-export's own evaluator. Not proven: how a GPU "
    "or a Neural Engine rounds.",
    device="On the Mac",
)
_PLANNED = ("profile", "target", "attention", "linear", "precision", "compress")


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
    settings = {name: getattr(plan, name) for name in _PLANNED}
    check = functools.partial(check_coreml, options=options)
    found = student_bundle_of(FORM, source, _of_the_bundle(export, options), settings, check)
    if found is not None:
        searched = options.target_psnr_db is not None or options.target_mb is not None
        stages = len(found[0].manifest.graphs) + searched
        make = functools.partial(compile_coreml, *found, options)
        try:
            make_form(FORM, export, make, stages, start, table=package_table)
        except ParityError as error:
            instead = gentler(plan, error.hops)
            if source.bundle is not None or not instead:
                raise
            # The bundle of the export is kept: it took minutes too.
            own = replace(own, **instead)  # type: ignore[arg-type]
            again = command_line(
                *(
                    "coreml",
                    "--ckpt",
                    source.ckpt,
                    *typed(export, ("base", "vae", "lora", "embedding")),
                ),
                *("--bundle", found[0].root, *typed(own, [each.name for each in fields(own)])),
            )
            raise ParityError(error.message, again) from error


def coreml_options(own: CoremlForm) -> CoremlOptions:
    """The options in the words of the export; files that they name are read."""
    recipe: dict[str, dict[str, int]] = {}
    if own.bits is not None:
        require("reading a recipe", EXPORT_NEEDS, "export")
        from tiue_export.export.coreml.recipe import read_recipe

        recipe = {graph: dict(bits) for graph, bits in read_recipe(own.bits).items()}
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


def package_table(form: Form, bundle: Bundle) -> Table:
    """Each package with its size, operations and largest activation."""
    compiled = bundle.manifest.compiled[form.folder]
    flags = compiled.flags
    title = (
        f"{bundle.root}/{form.folder}: {flags['profile']}, {flags['target']}, "
        f"{flags['attention']}, {flags['linear']}, decoder batch {flags['decoder_batch']}, "
        f"{flags['compute_unit']}"
    )
    measured = numbers("size", "max |x|", "ops", "convert s", "prove s", "peak memory")
    table = titled(title, *fixed("package"), "weights in", *measured, "most frequent")
    for graph, package in compiled.graphs.items():
        report = package.report
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
            str(report["most_frequent_ops"]),
        )
    return table
