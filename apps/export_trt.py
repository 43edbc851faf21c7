"""`tiue-export trt`: TensorRT engines from a checkpoint or a bundle, with proof of precision."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.engine_identity import PORTABLE
from tiue_export.bundle.folder import MANIFEST_FILE, Bundle, open_bundle
from tiue_export.bundle.manifest import Compiled, CompiledGraph
from tiue_export.errors import UsageError
from tiue_export.export.trt.bundle import (
    check_refittable,
    compile_trt,
    refit_from,
)
from tiue_export.export.trt.plan import TrtOptions, TrtPlan, plan_trt, resolve_target
from tiue_export.system.tensorrt_flavor import FOLDERS, TITLES

from .export_onnx import ExportRequest, export_first
from .method_options import MethodRequest
from .report.next_line import draw_line
from .report.stages import stage_bar
from .report.tables import console, megabytes, print_json


@dataclass(frozen=True)
class TrtRequest:
    """The options of `tiue-export trt`: a checkpoint, or a bundle that is there.

    `sm` lists compute capabilities without the point, "86,89"; `batch` is "1" or "min:opt:max".
    With a bundle, `method.max_decoder_rows` bounds the decoder's engine alone.
    """

    ckpt: str | None = None
    bundle: Path | None = None
    base: str | None = None
    vae: str | None = None
    out: Path | None = None
    flavor: str = "auto"
    sm: str | None = None
    precision: str | None = None
    batch: str | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    method: MethodRequest = field(default_factory=MethodRequest)
    optimization_level: int = 3
    workspace_mb: int = 0
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    refit_from: str | None = None
    rebuild: bool = False
    allow_parity_loss: bool = False
    dry_run: bool = False
    force: bool = False
    as_json: bool = False


def run(request: TrtRequest) -> None:
    """Build what is missing, or refit, and print the engines."""
    _check_request(request)
    options = TrtOptions(
        flavor=request.flavor,
        compute_capabilities=_compute_capabilities(request.sm),
        precision=request.precision,
        batch=_batch(request.batch),
        max_decoder_rows=request.method.max_decoder_rows if request.ckpt is None else None,
        optimization_level=request.optimization_level,
        workspace_mb=request.workspace_mb,
        version_compatible=request.version_compatible,
        hardware_compatible=request.hardware_compatible,
        refit=request.refit,
        rebuild=request.rebuild,
    )
    if request.refit_from is not None:
        _run_refit(request, request.refit_from)
        return
    if request.ckpt is not None:
        resolve_target(options)  # before the minutes that an export takes
        path = _export(request, options)
        if path is None:
            _print_target(options, request)
            return
    else:
        assert request.bundle is not None
        path = request.bundle
    start, opened = time.perf_counter(), open_bundle(path)
    plan = plan_trt(opened, options)
    if request.dry_run:
        _print_plan(opened, plan, as_json=request.as_json)
        return
    with stage_bar(quiet=request.as_json) as bar:
        bar.expect(len(plan.to_build))
        built = compile_trt(opened, options, bar.observer())
    seconds = time.perf_counter() - start
    _print_result(built, plan.flavor.folder, plan.to_build, seconds, request)


def engine_table(compiled: Compiled) -> Table:
    """Each engine with its size, what it took to build, and the precision of its layers."""
    title = f"{TITLES[compiled.backend]} {compiled.version} engines for {_for_whom(compiled)}"
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("graph", no_wrap=True)
    int8 = any("products_int8" in graph.report for graph in compiled.graphs.values())
    for column in ("plan", "build s", "peak memory", "layers in half", "in float", "casts"):
        table.add_column(column, justify="right")
    if int8:
        table.add_column("products in int8", justify="right")
    table.add_column("what is in float", overflow="fold")
    for name, graph in compiled.graphs.items():
        report = graph.report
        table.add_row(
            name,
            megabytes(_plan_bytes(graph)),
            f"{float(report.get('build_seconds', 0)):.1f}",
            megabytes(float(report.get("peak_memory_bytes", 0))),
            str(report.get("layers_half", "?")),
            str(report.get("layers_float", "?")),
            str(report.get("layers_cast", "?")),
            *([str(report.get("products_int8", 0))] if int8 else []),
            escape(str(report.get("float_because", "")) or "-"),
        )
    return table


def _check_request(request: TrtRequest) -> None:
    if (request.ckpt is None) == (request.bundle is None):
        raise UsageError(
            "give a checkpoint or a bundle, one of them",
            "tiue-export trt --ckpt student.safetensors, or tiue-export trt --bundle BUNDLE.",
        )
    if request.ckpt is None:
        # The student that --refit-from names may need a base, and gets a bundle of its own.
        exports = request.refit_from is not None
        given = {
            "--base": None if exports else request.base,
            "--vae": None if exports else request.vae,
            "--out": None if exports else request.out,
            "--height": request.height,
            "--width": request.width,
            "--steps": request.steps,
            "--method and what goes with it": _method_given(request.method),
            "--max-decoder-rows": request.method.max_decoder_rows if exports else None,
            "--allow-parity-loss": request.allow_parity_loss or None,
        }
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise UsageError(
                f"{', '.join(extra)} belongs to --ckpt; a bundle has it settled, and engines are "
                f"{'given other weights' if exports else 'added to it'}",
                "Leave it out, or export again with --ckpt.",
            )
    elif request.precision == "int8":
        raise UsageError(
            "--precision int8 takes a quantized bundle: int8 needs ranges measured on real prompts",
            "tiue-export onnx, calibrate, quantize --any-speed, then trt --bundle: docs/int8.md.",
        )
    elif request.refit_from is not None:
        raise UsageError(
            "--refit-from takes engines that are there",
            "Name their bundle: --bundle BUNDLE --refit-from NEW.",
        )
    else:
        request.method.check()


def _method_given(method: MethodRequest) -> bool | None:
    """Whether anything was given that decides graphs; the rows of a run are an engine's too."""
    return replace(method, max_decoder_rows=None) != MethodRequest() or None


def _compute_capabilities(sm: str | None) -> tuple[str, ...]:
    """ "86,89,120" -> ("8.6", "8.9", "12.0"); with the point is understood too."""
    found = []
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
        found.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(found)


def _batch(text: str | None) -> tuple[int, int, int] | None:
    """ "2" -> (2, 2, 2); "1:2:4" -> (1, 2, 4)."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise UsageError(
            f"--batch is {text!r}; expected one number, or min:opt:max",
            "Write --batch 1, or --batch 1:2:4.",
        )
    numbers = [int(part) for part in parts]
    smallest, usual, largest = numbers * 3 if len(numbers) == 1 else numbers
    return smallest, usual, largest


def _export(request: TrtRequest, options: TrtOptions) -> Path | None:
    """Export the checkpoint to an ONNX bundle; None after a dry run printed its plan."""
    assert request.ckpt is not None
    low, _, high = options.batch or (1, 1, 1)
    asked = ExportRequest(
        request.ckpt,
        request.out,
        base=request.base,
        vae=request.vae,
        precision=request.precision or "fp16",
        height=request.height,
        width=request.width,
        batch=low,
        dynamic_batch=low != high,
        steps=request.steps,
        method=request.method,
        allow_parity_loss=request.allow_parity_loss,
        dry_run=request.dry_run,
        force=request.force,
        as_json=request.as_json,
    )
    return _run_export(asked, "trt --bundle")


def _run_export(asked: ExportRequest, instead: str) -> Path | None:
    out = export_first(asked, instead)
    _give_memory_back()
    return out


def _give_memory_back() -> None:
    # The builder needs what the export has used, and torch's allocator keeps what it once had.
    from tiue_export.system.memory import return_freed_memory

    return_freed_memory()


def _run_refit(request: TrtRequest, source: str) -> None:
    assert request.bundle is not None
    start, old = time.perf_counter(), open_bundle(request.bundle)
    compiled, _ = check_refittable(old)  # before the minutes that an export takes
    place = Path(source)
    if (place / MANIFEST_FILE).is_file():
        new = open_bundle(place)
    else:
        path = _run_export(_like(old, source, request), f"trt --bundle {old.root} --refit-from")
        assert path is not None
        new = open_bundle(path)
    with stage_bar(quiet=request.as_json) as bar:
        bar.expect(len(old.manifest.graphs))
        refitted = refit_from(old, new, bar.observer())
    seconds = time.perf_counter() - start
    folder = FOLDERS[compiled.backend]
    names = tuple(refitted.manifest.compiled[folder].graphs)
    _print_result(refitted, folder, names, seconds, request)


def _like(old: Bundle, ckpt: str, request: TrtRequest) -> ExportRequest:
    """An export of another checkpoint with the options of a bundle."""
    manifest = old.manifest
    if manifest.schedule.merged_timesteps:
        raise UsageError(
            f"{old.root} has merged rows, whose threshold it does not keep",
            "Export the new student yourself with the same --merge-below, and name that bundle.",
        )
    if manifest.faster is not None:
        raise UsageError(
            f"{old.root} draws in a loop (Faster Diffusion); its export has options of its own",
            "Export the new model yourself with the same options, and name that bundle.",
        )
    return ExportRequest(
        ckpt,
        request.out,
        base=request.base,
        vae=request.vae,
        precision=manifest.precision,
        height=manifest.height_px,
        width=manifest.width_px,
        batch=manifest.batch or 1,
        dynamic_batch=manifest.batch is None,
        steps=manifest.schedule.steps,
        hoist=manifest.hoisted,
        force=request.force,
        as_json=request.as_json,
    )


def _print_result(
    bundle: Bundle, folder: str, built: tuple[str, ...], seconds: float, request: TrtRequest
) -> None:
    compiled = bundle.manifest.compiled[folder]
    if request.as_json:
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
    total = sum(_plan_bytes(graph) for graph in compiled.graphs.values())
    kept = [name for name in compiled.graphs if name not in built]
    console.print(
        f"[bold green]{escape(str(bundle.root / folder))}[/]: {megabytes(total)}, "
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
    console.print(f"next:  {draw_line(bundle, '--runtime trt')}", markup=False)


def _print_plan(bundle: Bundle, plan: TrtPlan, *, as_json: bool) -> None:
    sizes = {
        name: sum(record.size_bytes for record in bundle.manifest.graphs[name].files.values())
        for name in plan.identities
    }
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
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("graph", "ONNX", "engine"):
        table.add_column(column)
    for name, size_bytes in sizes.items():
        state = "to build" if name in plan.to_build else "valid already"
        table.add_row(name, megabytes(size_bytes), state)
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


def _print_target(options: TrtOptions, request: TrtRequest) -> None:
    if request.as_json:
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


def _plan_bytes(graph: CompiledGraph) -> int:
    return sum(record.size_bytes for record in graph.files.values())
