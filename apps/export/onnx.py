"""A checkpoint to a verified bundle: checked, loaded, exported with progress, and told."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import MANIFEST_FILE, Bundle, read_manifest
from tiue_export.bundle.write import check_target
from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import BundleError
from tiue_export.proof.half_range import load_audit
from tiue_export.registry.packages import EXPORT_NEEDS, require
from tiue_export.registry.support import features_of, refusal_of
from tiue_export.specs import CONTROLNET, GRAPH_NAMES, NEAREST, TEXT_ENCODER, VAE_DECODER
from tiue_export.system.command_line import command_line

from ..draw.prompt_file import prompts_in
from ..options.graphs import ExportRequest
from ..options.group import picked
from ..report.next_line import draw_line, print_next
from ..report.stages import stage_bar
from ..report.tables import (
    console,
    fixed,
    graph_table,
    island_lines,
    megabytes,
    numbers,
    overflow_table,
    parity_table,
    print_json,
    titled,
)
from .fan_out import check_fan_out, curve_facts, curve_table, measured_fan_out

if TYPE_CHECKING:
    from tiue_export.export.dry_run import ExportPlan
    from tiue_export.graphs.options import ExportOptions
    from tiue_export.proof.fan_out_curve import FanOutCurve
    from tiue_export.student.model import Student
    from tiue_export.system.progress import StageReport

# Refuses a bundle that a student will be made into, before the work.
Check = Callable[["Bundle", "Student"], None]
_VISIBLE_LOSS_DB = 40.0
_LARGEST = 3


@dataclass(frozen=True)
class Exported:
    """A bundle that was just made: how long it took, and each stage as JSON tells it.

    `student` is what it was made from, where more will be made from it; `curve` what `--fan-out
    auto` measured.
    """

    bundle: Bundle
    seconds: float
    stages: list[dict[str, object]]
    student: Student | None = None
    curve: FanOutCurve | None = None


def export_checkpoint(
    ckpt: str,
    export: ExportRequest,
    precision: str,
    instead: Sequence[str] = (),
    *,
    verb: str = "onnx",
    from_student: Check | None = None,
) -> Exported | None:
    """Export behind a progress bar; None after a dry run, whose plan is printed.

    Everything that can be refused without the model is refused before it is loaded, what `verb`
    cannot go on with too. `instead` is the command that would use a bundle which lies at the output
    already. `from_student`: no ONNX files are written, as the graphs will be made from the student;
    it may refuse the bundle that will be.
    """
    require("exporting", EXPORT_NEEDS, "export")
    from tiue_export.export.load import check_request, load_to_export

    export.check_audit(precision)
    check_fan_out(export)
    if from_student is not None:
        export = replace(export, upsampling=NEAREST)
    options, quiet = graph_options(export, precision), export.as_json
    method, sampling = export.method, export.sampling()
    check_request(verb, export.checkpoint(ckpt), method, sampling, options)
    prompts = prompts_in(export.audit_prompts, "--audit-prompts")
    check_checkpoint_path(ckpt)
    out = output_path(ckpt, export, precision if from_student is None else verb)
    if not export.dry_run:
        _check_output(out, verb, instead, force=export.force)
    from tiue_export.export.contract import export_contract
    from tiue_export.export.dry_run import plan_export
    from tiue_export.export.onnx.bundle import export_onnx
    from tiue_export.system.progress import stage

    start = time.perf_counter()
    reports: list[StageReport] = []
    with stage_bar(quiet=quiet) as bar:
        observer = bar.observer(reports)
        with stage(observer, "load student"):
            request = export.checkpoint(ckpt)
            student = load_to_export(
                request, method, sampling, options, lambda part: bar.begin(f"load {part}")
            )
        student, options, curve = measured_fan_out(student, options, export, observer)
        # Said now: the work takes minutes.
        for text in student.source.notes:
            bar.note(f"note: {text}")
        missing = _missing(student)
        if missing:
            _warn_of_missing(ckpt, missing)
        if export.dry_run:
            plan = plan_export(student, options)
            told = {"missing": missing, "notes": student.source.notes, **_told(curve)}
            if not quiet:
                _print_curve(curve)
            _print_plan(plan, out, told, as_json=quiet, onnx=from_student is None)
            return None
        written = {"force": export.force, "allow_parity_loss": export.allow_parity_loss}
        if from_student is not None:
            bar.expect(2 + bool(curve))  # load, fan-out, reference
            bundle = export_contract(
                student,
                out,
                options,
                check=lambda bundle: from_student(bundle, student),
                observer=observer,
                **written,
            )
            return _exported(bundle, start, reports, student, curve)
        graphs = 2 + (student.text_encoder is not None) + (student.vae is not None)
        graphs += options.with_vae_encoder
        loop = not student.plan.one_pass
        # Load, fan-out, reference, audit, export each, verify each, verify the loop.
        bar.expect(2 + bool(curve) + bool(prompts) + 2 * graphs + loop)
        bundle = export_onnx(
            student,
            out,
            options,
            audit=not export.no_audit,
            audit_prompts=prompts,
            observer=observer,
            **written,
        )
    return _exported(bundle, start, reports, curve=curve)


def _exported(
    bundle: Bundle,
    start: float,
    reports: list[StageReport],
    student: Student | None = None,
    curve: FanOutCurve | None = None,
) -> Exported:
    stages = [dataclasses.asdict(report) for report in reports]
    return Exported(bundle, time.perf_counter() - start, stages, student, curve)


def graph_options(export: ExportRequest, precision: str) -> ExportOptions:
    """The options in the words of the graphs; wrong ones are refused here."""
    from tiue_export.graphs.options import ExportOptions

    batch, dynamic_batch = export.graph_batch()
    return picked(
        ExportOptions,
        export,
        precision=precision,
        batch=batch,
        dynamic_batch=dynamic_batch,
        fan_out=export.given_fan_out(),
    )


def output_path(ckpt: str, export: ExportRequest, kind: str) -> Path:
    """`--out`, or NAME-KIND in the current folder: by its precision, or by its only form."""
    place = Path(ckpt).resolve()
    name = place.stem if place.suffix == ".safetensors" else place.name
    from tiue_export.methods.load import DEFAULT_METHOD

    sampler = export.recipe or (None if export.method == DEFAULT_METHOD else export.method)
    method = "" if sampler is None else f"-{sampler}"
    return export.out or Path(f"{name}{method}-{kind}")


def _check_output(out: Path, verb: str, instead: Sequence[str], *, force: bool) -> None:
    if instead and (out / MANIFEST_FILE).is_file() and not force and _takes(verb, out):
        raise BundleError(
            f"{out} already holds a bundle",
            f"Use it: {command_line(*instead, out)}; or choose another --out, or pass --force to "
            "export again.",
        )
    check_target(out, force=force)


def _takes(verb: str, bundle: Path) -> bool:
    """Whether a verb can go on with the bundle that lies there."""
    try:
        manifest = read_manifest(bundle)
    except BundleError:
        return False
    return refusal_of(verb, features_of(manifest)) is None


def print_exported(exported: Exported, *, as_json: bool, is_last: bool = True) -> None:
    """Graphs, audit and parity, and the line to type next; or one JSON object.

    `is_last`: nothing more is made, that may fail.
    """
    bundle, manifest = exported.bundle, exported.bundle.manifest
    if as_json:
        print_json(
            {
                "bundle": str(bundle.root),
                "missing": [name for name in GRAPH_NAMES if name not in manifest.graphs],
                "seconds": round(exported.seconds, 2),
                "stages": exported.stages,
                **_told(exported.curve),
                "manifest": dataclasses.asdict(manifest),
            }
        )
        return
    _print_curve(exported.curve)
    console.print(graph_table(manifest))
    _print_proof(bundle)
    console.print(
        f"[bold green]{escape(str(bundle.root))}[/]: {megabytes(bundle.size_bytes)} in "
        f"{exported.seconds:.0f} s, {manifest.width_px}x{manifest.height_px} px, {_steps(bundle)}"
    )
    if not _print_missing(manifest) and is_last:
        more = ["--control edges.png"] if CONTROLNET in manifest.graphs else []
        print_next(draw_line(bundle, *more, "--time"))


def print_contract(exported: Exported) -> None:
    """What PyTorch proved of a bundle whose graphs will be made from the student."""
    manifest = exported.bundle.manifest
    _print_curve(exported.curve)
    console.print(parity_table(manifest.parity))
    _print_missing(manifest)


def _print_curve(curve: FanOutCurve | None) -> None:
    if curve is not None:
        console.print(curve_table(curve))


def _told(curve: FanOutCurve | None) -> dict[str, object]:
    return {} if curve is None else {"fan_out_curve": curve_facts(curve)}


def _missing(student: Student) -> list[str]:
    """The parts of drawing that a checkpoint does not bring, by their graphs."""
    parts = ((TEXT_ENCODER, student.text_encoder), (VAE_DECODER, student.vae))
    return [name for name, part in parts if part is None]


def _warn_of_missing(ckpt: str, missing: Sequence[str]) -> None:
    print(
        f"warning: the bundle will not draw: {ckpt} brings no {' and no '.join(missing)}; add "
        "--base PIPELINE_FOLDER for them",
        file=sys.stderr,
    )


def _print_missing(manifest: Manifest) -> bool:
    """Name the graphs that the checkpoint had no parts for; whether there are any."""
    missing = [name for name in GRAPH_NAMES if name not in manifest.graphs]
    if missing:
        print_next(f"the same line with --base PIPELINE_FOLDER, for {' and '.join(missing)}")
    return bool(missing)


def _print_proof(bundle: Bundle) -> None:
    """What the audit found and what parity cost."""
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
                f"{record.value:.1f} dB.[/]{_remedy(record.hop)}"
            )
    if bundle.manifest.parity_loss_allowed:
        console.print("[bold yellow]A gate failed and was allowed; the manifest says so.[/]")


def _remedy(hop: str) -> str:
    """What to change where a loss that no gate judges can be seen."""
    known = {
        "merged": "Lower --merge-below.",
        "tiled": "Raise --vae-tile, or leave it out.",
        "shared encoder": "Give more --key-steps, or leave them out.",
    }
    return next((f" {remedy}" for name, remedy in known.items() if hop.startswith(name)), "")


def _steps(bundle: Bundle) -> str:
    plan = bundle.manifest.plan
    if plan.one_pass:
        return f"{plan.recipe}, one pass" if plan.recipe else f"K={plan.steps}"
    return f"{plan.rows} {plan.scheduler} steps, encoder at {len(plan.passes)} of them"


def _print_plan(
    plan: ExportPlan, out: Path, told: Mapping[str, object], *, as_json: bool, onnx: bool
) -> None:
    if as_json:
        print_json({"bundle": str(out), **told, **dataclasses.asdict(plan)})
        return
    columns = (*fixed("graph"), *numbers("inputs", "outputs", "weights"))
    table = titled("Plan (nothing was written)", *columns)
    for graph in plan.graphs:
        table.add_row(
            graph.name, str(graph.inputs), str(graph.outputs), megabytes(graph.weight_bytes)
        )
    console.print(table)
    if plan.key_steps:
        at = ", ".join(map(str, plan.key_steps))
        what = f"{len(plan.timesteps)} steps, the encoder runs at steps {at}"
    else:
        name = plan.recipe or f"K={plan.steps}"
        what = f"{name}, decoder rows at t = {', '.join(map(str, plan.timesteps))}"
    console.print(f"latents {plan.latent_shape}, {what}")
    weights = "disk" if onnx else "float32 weights"
    console.print(
        f"{weights} {megabytes(plan.size_bytes)} at {out}, memory about "
        f"{megabytes(plan.memory_bytes)}",
        markup=False,
    )
