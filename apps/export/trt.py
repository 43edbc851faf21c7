"""TensorRT engines from a checkpoint or a bundle, with proof of precision."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.engine_identity import PORTABLE
from tiue_export.bundle.manifest import Compiled
from tiue_export.bundle.read import Bundle
from tiue_export.errors import UsageError
from tiue_export.export.trt.bundle import compile_trt
from tiue_export.export.trt.plan import TrtOptions, TrtPlan, int8_lines, plan_trt, resolve_target
from tiue_export.system.command_line import command_line
from tiue_export.system.tensorrt_flavor import TITLES

from ..options.checkpoint import SourceOptions
from ..options.graphs import ExportRequest
from ..options.group import picked
from ..options.trt import EngineOptions
from ..report.next_line import draw_line, print_next
from ..report.stages import stage_bar
from ..report.tables import console, fixed, megabytes, numbers, print_json, titled
from .forms import Form, bundle_of, check_source

FORM = Form("trt", "TensorRT", "trt", ("max_decoder_rows", "batch", "dry_run", "force", "as_json"))


def run(source: SourceOptions, engine: EngineOptions, export: ExportRequest) -> None:
    """Build what is missing, and print the engines."""
    if source.ckpt is not None and engine.precision == "int8":
        raise UsageError(
            "--precision int8 takes a quantized bundle: int8 needs ranges measured on real prompts",
            f"{command_line('onnx', '--ckpt', source.ckpt, '--out', 'BUNDLE')}, then "
            f"{int8_lines('BUNDLE')}, then tiue-export trt --bundle INT8",
        )
    check_source(FORM, source, export, batch_range=True)
    options = _trt_options(source, engine, export)
    as_json = export.as_json
    if source.ckpt is not None:
        resolve_target(options)  # before the minutes that an export takes
    bundle = bundle_of(FORM, source, export, engine.precision or "fp16")
    if bundle is None:
        _print_target(options, as_json=as_json)
        return
    if source.ckpt is not None:
        give_memory_back()
    start, plan = time.perf_counter(), plan_trt(bundle, options)
    if export.dry_run:
        _print_plan(bundle, plan, as_json=as_json)
        return
    with stage_bar(quiet=as_json) as bar:
        bar.expect(len(plan.to_build))
        built = compile_trt(bundle, options, bar.observer())
    seconds = time.perf_counter() - start
    print_engines(built, plan.flavor.folder, plan.to_build, seconds, as_json=as_json)


def engine_table(compiled: Compiled) -> Table:
    """Each engine with its size, what it took to build, and the precision of its layers."""
    title = f"{TITLES[compiled.backend]} {compiled.version} engines for {_for_whom(compiled)}"
    int8 = any("products_int8" in graph.report for graph in compiled.graphs.values())
    measured = ("plan", "build s", "peak memory", "layers in half", "in float", "casts")
    counts = numbers(*measured, *(["products in int8"] if int8 else []))
    table = titled(title, *fixed("graph"), *counts, "what is in float")
    for name, graph in compiled.graphs.items():
        report = graph.report
        table.add_row(
            name,
            megabytes(graph.size_bytes),
            f"{float(report.get('build_seconds', 0)):.1f}",
            megabytes(float(report.get("peak_memory_bytes", 0))),
            str(report.get("layers_half", "?")),
            str(report.get("layers_float", "?")),
            str(report.get("layers_cast", "?")),
            *([str(report.get("products_int8", 0))] if int8 else []),
            str(report.get("float_because", "")) or "-",
        )
    return table


def give_memory_back() -> None:
    """The builder needs what the export has used; torch's allocator keeps what it once had."""
    from tiue_export.system.memory import return_freed_memory

    return_freed_memory()


def print_engines(
    bundle: Bundle, folder: str, built: Sequence[str], seconds: float, *, as_json: bool
) -> None:
    """The engines of a bundle, those that were just made among them; or one JSON object."""
    compiled = bundle.manifest.compiled[folder]
    if as_json:
        print_json(
            {
                "bundle": str(bundle.root),
                "seconds": round(seconds, 2),
                "built": list(built),
                "compiled": {folder: dataclasses.asdict(compiled)},
            }
        )
        return
    console.print(engine_table(compiled))
    kept = [name for name in compiled.graphs if name not in built]
    console.print(
        f"[bold green]{escape(str(bundle.root / folder))}[/]: {megabytes(compiled.size_bytes)}, "
        f"{len(built)} built in {seconds:.0f} s"
        + (f", {len(kept)} valid already: {', '.join(kept)}" if kept else ""),
        highlight=False,
    )
    if not any("engine_layers_half" in graph.report for graph in compiled.graphs.values()):
        console.print(
            "Layers are counted in the strongly typed network, whose types bind the builder; "
            "the engine itself opens on its GPU only.",
            highlight=False,
        )
    print_next(draw_line(bundle, "--runtime trt"))


def _trt_options(source: SourceOptions, engine: EngineOptions, export: ExportRequest) -> TrtOptions:
    """The options in the words of the build; a plan that is exported now has its own bound."""
    return picked(
        TrtOptions,
        engine,
        compute_capabilities=_compute_capabilities(engine.sm),
        # What --force means of every other form: made again, though it is there.
        rebuild=engine.rebuild or (source.ckpt is None and export.force),
        batch=export.batch_profile(),
        max_decoder_rows=export.max_decoder_rows if source.ckpt is None else None,
    )


def _compute_capabilities(sm: str | None) -> tuple[str, ...]:
    """ "86,89,120" -> ("8.6", "8.9", "12.0"); with the point is understood too."""
    listed = []
    for part in (sm or "").split(","):
        text = part.strip().lower().removeprefix("sm").removeprefix("_")
        if not text:
            continue
        digits = text.replace(".", "", 1)
        if not digits.isdigit() or len(digits) < 2:
            raise UsageError(
                f"--sm {part.strip()!r} is no compute capability; expected numbers such as "
                "86,89,120",
                "RTX 30: 86, RTX 40: 89, RTX 50: 120; nvidia-smi --query-gpu=compute_cap tells.",
            )
        listed.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(listed)


def _print_plan(bundle: Bundle, plan: TrtPlan, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "bundle": str(bundle.root),
                "flavor": plan.flavor.name,
                "version": plan.flavor.version,
                "target": plan.target,
                "flags": plan.flags,
                "to_build": plan.to_build,
                "identities": plan.identities,
            }
        )
        return
    title = f"Plan for {plan.flavor.title} (nothing was built)"
    table = titled(title, "graph", "ONNX", "engine")
    for name in plan.identities:
        state = "to build" if name in plan.to_build else "valid already"
        table.add_row(name, megabytes(bundle.manifest.graphs[name].size_bytes), state)
    console.print(table)
    console.print(_settings(plan), markup=False)


def _settings(plan: TrtPlan) -> str:
    target = ", ".join(f"{key} {value}" for key, value in plan.target.items())
    flags = plan.flags
    batch = ":".join(map(str, dict.fromkeys(plan.batch)))
    parts = [
        f"{flags['precision']}",
        f"batch {batch}",
        *(
            [f"decoder steps {plan.decoder_steps[0]} to {plan.decoder_steps[-1]} at once"]
            if plan.decoder_steps
            else []
        ),
        f"optimization level {flags['optimization_level']}",
        f"workspace {flags['workspace_mb']} MB"
        if flags["workspace_mb"]
        else "workspace: what fits",
        *(name.replace("_", " ") for name, value in flags.items() if value is True),
    ]
    return f"for {target}\nwith {', '.join(parts)}"


def _print_target(options: TrtOptions, *, as_json: bool) -> None:
    if as_json:
        return  # one JSON object, which the export's plan was
    flavor, _, target = resolve_target(options)
    words = ", ".join(f"{key} {value}" for key, value in target.items())
    console.print(f"then engines by {flavor.title} for {words}", markup=False)


def _for_whom(compiled: Compiled) -> str:
    target = compiled.target
    if "gpu" in target:
        return f"{target['gpu']} ({target['compute_capability']})"
    wanted = target.get("compute_capabilities", "?")
    return (
        "Ampere and newer"
        if wanted == PORTABLE
        else f"compute capability {wanted.replace(',', ', ')}"
    )
