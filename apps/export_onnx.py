"""`tiue-export onnx`: load, export with progress, print what was made and what it proved."""

from __future__ import annotations

import dataclasses
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.folder import MANIFEST_FILE, Bundle, check_target
from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import BundleError
from tiue_export.proof.half_range import load_audit
from tiue_export.registry.packages import EXPORT_NEEDS, require
from tiue_export.specs import CONTROLNET, GRAPH_NAMES

from .draw.prompt_file import prompts_in
from .method_options import LoadRequest, MethodRequest, load
from .report.next_line import draw_line
from .report.stages import stage_bar
from .report.tables import (
    console,
    graph_table,
    island_lines,
    megabytes,
    overflow_table,
    parity_table,
    print_json,
)

_VISIBLE_LOSS_DB = 40.0
_LARGEST = 3


@dataclass(frozen=True)
class ExportRequest:
    """The options of `tiue-export onnx`."""

    ckpt: str
    out: Path | None = None
    base: str | None = None
    vae: str | None = None
    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    batch: int = 1
    dynamic_batch: bool = False
    steps: int | None = None
    allow_other_steps: bool = False
    family: str | None = None
    hoist: str = "decoder"
    merge_below: float = 0.0
    vae_precision: str = "auto"
    vae_tile: int | None = None
    audit: bool = True
    audit_prompts: Path | None = None
    allow_parity_loss: bool = False
    dry_run: bool = False
    force: bool = False
    as_json: bool = False
    method: MethodRequest = field(default_factory=MethodRequest)


def run(request: ExportRequest) -> None:
    """Export and print the result, or the plan for a dry run."""
    require("exporting", EXPORT_NEEDS, "export")
    request.method.check()
    check_checkpoint_path(request.ckpt)
    out = output_path(request)
    if not request.dry_run:
        check_target(out, force=request.force)
    bundle, stages, seconds = export(request, out)
    if bundle is None:
        return
    if request.as_json:
        print_json(
            {
                "bundle": str(out),
                "seconds": round(seconds, 2),
                "stages": stages,
                "manifest": dataclasses.asdict(bundle.manifest),
            }
        )
        return
    for note in bundle.manifest.source.notes:
        console.print(f"note: {note}", markup=False)
    console.print(graph_table(bundle.manifest))
    audit = load_audit(bundle)
    if audit is not None:
        console.print(overflow_table(audit.graphs, _LARGEST))
        for line in island_lines(audit.graphs):
            console.print(line, markup=False, soft_wrap=True)
    console.print(parity_table(bundle.manifest.parity))
    for record in bundle.manifest.parity:
        if record.gate is None and record.value < _VISIBLE_LOSS_DB:
            console.print(
                f"[bold yellow]{record.hop} costs more than a visible amount: "
                f"{record.value:.1f} dB.[/] Lower --merge-below."
            )
    if bundle.manifest.parity_loss_allowed:
        console.print("[bold yellow]A gate failed and was allowed; the manifest says so.[/]")
    console.print(
        f"[bold green]{escape(str(out))}[/]: {megabytes(bundle.size_bytes)} in {seconds:.0f} s, "
        f"{bundle.manifest.width_px}x{bundle.manifest.height_px} px, {_steps(bundle)}"
    )
    missing = [name for name in GRAPH_NAMES if name not in bundle.manifest.graphs]
    if missing:
        console.print(f"Without {' and '.join(missing)}, which --base would bring.")
    else:
        more = ["--control edges.png"] if CONTROLNET in bundle.manifest.graphs else []
        console.print(f"next:  {draw_line(bundle, *more, '--time')}", markup=False)


def _steps(bundle: Bundle) -> str:
    plan = bundle.manifest.faster
    if plan is None:
        return f"K={bundle.manifest.schedule.steps}"
    calls = len(bundle.manifest.schedule.timesteps)
    return f"{calls} {plan.scheduler} steps, encoder at {len(plan.groups)} of them"


def output_path(request: ExportRequest) -> Path:
    """`--out`, or NAME-PRECISION in the current folder."""
    place = Path(request.ckpt).resolve()
    name = place.stem if place.suffix == ".safetensors" else place.name
    method = "" if request.method.method == "tiue" else f"-{request.method.method}"
    return request.out or Path(f"{name}{method}-{request.precision}")


def export_first(asked: ExportRequest, instead: str) -> Path | None:
    """The bundle that another command goes on with; None after a dry run printed its plan.

    `instead` is what to type with a bundle that is there already. With JSON nothing is printed: the
    other command's object is the only one.
    """
    out = output_path(asked)
    if (out / MANIFEST_FILE).is_file() and not asked.force and not asked.dry_run:
        raise BundleError(
            f"{out} already holds a bundle",
            f"Use it: tiue-export {instead} {shlex.quote(str(out))}; or choose another --out, or "
            "pass --force to export again.",
        )
    if asked.as_json:
        require("exporting", EXPORT_NEEDS, "export")
        check_checkpoint_path(asked.ckpt)
        check_target(out, force=asked.force)
        export(asked, out)
    else:
        run(asked)
    return None if asked.dry_run else out


def export(
    request: ExportRequest, out: Path
) -> tuple[Bundle | None, list[dict[str, object]], float]:
    """Load and export behind a progress bar; (None, [], 0) after a dry run printed its plan."""
    from tiue_export.export.dry_run import plan_export
    from tiue_export.export.onnx.bundle import export_onnx
    from tiue_export.graphs.build import ExportOptions
    from tiue_export.system.progress import StageReport, stage

    options = ExportOptions(
        precision=request.precision,
        height=request.height,
        width=request.width,
        batch=request.batch,
        dynamic_batch=request.dynamic_batch,
        hoist=request.hoist,
        merge_below=request.merge_below,
        vae_precision=request.vae_precision,
        vae_tile=request.vae_tile,
    )
    prompts = prompts_in(request.audit_prompts, "--audit-prompts")
    start = time.perf_counter()
    reports: list[StageReport] = []
    with stage_bar(quiet=request.as_json) as bar:
        observer = bar.observer(reports)
        with stage(observer, "load student"):
            asked = LoadRequest(
                request.ckpt,
                base=request.base,
                vae=request.vae,
                family=request.family,
                steps=request.steps,
                allow_other_steps=request.allow_other_steps,
            )
            student = load(asked, request.method, lambda part: bar.begin(f"load {part}"))
        if request.dry_run:
            _print_plan(plan_export(student, options), out, as_json=request.as_json)
            return None, [], 0.0
        graphs = 2 + (student.text_encoder is not None) + (student.vae is not None)
        more = bool(prompts) and request.audit and request.precision == "fp16"
        loop = student.plan is not None
        # Load, reference, audit, export each, verify each, verify the loop.
        bar.expect(2 + more + 2 * graphs + loop)
        bundle = export_onnx(
            student,
            out,
            options,
            force=request.force,
            allow_parity_loss=request.allow_parity_loss,
            audit=request.audit,
            audit_prompts=prompts,
            observer=observer,
        )
    return bundle, [dataclasses.asdict(report) for report in reports], time.perf_counter() - start


def _print_plan(plan: object, out: Path, *, as_json: bool) -> None:
    from tiue_export.export.dry_run import Plan

    assert isinstance(plan, Plan)
    if as_json:
        print_json({"bundle": str(out), **dataclasses.asdict(plan)})
        return
    table = Table(title="Plan (nothing was written)", title_justify="left", title_style="bold")
    for column in ("graph", "inputs", "outputs", "weights"):
        table.add_column(column, justify="left" if column == "graph" else "right")
    for graph in plan.graphs:
        table.add_row(
            graph.name, str(graph.inputs), str(graph.outputs), megabytes(graph.weight_bytes)
        )
    console.print(table)
    if plan.key_steps:
        at = ", ".join(map(str, plan.key_steps))
        what = f"{len(plan.timesteps)} steps, the encoder runs at steps {at}"
    else:
        what = f"K={plan.steps}, decoder rows at t = {', '.join(map(str, plan.timesteps))}"
    console.print(f"latents {plan.latent_shape}, {what}")
    console.print(
        f"disk {megabytes(plan.size_bytes)} at {out}, memory about {megabytes(plan.memory_bytes)}",
        markup=False,
    )
