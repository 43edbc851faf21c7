"""What every command does that adds a compiled form to a bundle: source, plan, result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import BundleError, UsageError
from tiue_export.registry.support import VERBS, check_options, require_support
from tiue_export.system.command_line import command_line
from tiue_export.system.progress import stage

from ..options.checkpoint import SourceOptions, StudentSourceOptions
from ..options.graphs import ExportRequest
from ..options.group import given, refuse
from ..report.next_line import draw_line, print_next
from ..report.stages import stage_bar
from ..report.tables import console, fixed, megabytes, numbers, parity_table, print_json, titled
from .onnx import Check, export_checkpoint, print_contract, print_exported

if TYPE_CHECKING:
    from tiue_export.student.model import Student

# What a command still means when the bundle is there already, and when a student is loaded too.
_OF_ANY_SOURCE = ("allow_parity_loss", "dry_run", "force", "as_json")
_BASE = ("--base", "PIPELINE_FOLDER")
OF_A_STUDENT = (*_OF_ANY_SOURCE, "base", "vae", "lora", "embedding")


@dataclass(frozen=True)
class Form:
    """One compiled form: its command, its name for people and its folder in a bundle.

    `usable` names the fields of an export's options that it can use beside `--bundle` too.
    `proof` is what its parity is of, `remark` what is said of it; `device`: where it will run, if
    not here.
    """

    command: str
    title: str
    folder: str
    usable: Collection[str] = _OF_ANY_SOURCE
    proof: str = ""
    remark: str = ""
    device: str = ""


def check_source(
    form: Form, source: SourceOptions, export: ExportRequest, *, batch_range: bool = False
) -> None:
    """Refuse, before any work, sources that are not one and options that would have no effect.

    `batch_range`: a form of a range of batches, as TensorRT's engines are.
    """
    needs_student = isinstance(source, StudentSourceOptions)
    if needs_student and source.ckpt is None:
        place = ("--bundle", source.bundle) if source.bundle else ()
        raise UsageError(
            f"--ckpt is missing: {form.title} reads no ONNX, so its graphs are made from the "
            "student itself, also for a bundle that is there",
            command_line(form.command, "--ckpt", "student.safetensors", *_BASE, *place),
        )
    if not needs_student and (source.ckpt is None) == (source.bundle is None):
        raise UsageError(
            "give a checkpoint or a bundle, one of them",
            command_line(form.command, "--ckpt", "student.safetensors", *_BASE)
            + ", or --bundle BUNDLE.",
        )
    if source.bundle is not None:
        refuse(
            f"for the export of a checkpoint; {source.bundle} has its graphs already",
            "Leave it out, or export anew with --ckpt and without --bundle.",
            export,
            usable=form.usable,
        )
    check_options(form.command, given(export))
    if not batch_range:
        export.check_one_batch()
    if source.ckpt is not None:
        check_checkpoint_path(source.ckpt)


def named_bundle(form: Form, source: SourceOptions) -> Bundle:
    """The bundle of `--bundle`, once it can have the form."""
    assert source.bundle is not None
    bundle = open_bundle(source.bundle)
    require_support(form.command, bundle)
    return bundle


def bundle_of(
    form: Form, source: SourceOptions, export: ExportRequest, precision: str = "fp32"
) -> Bundle | None:
    """The bundle that was named, or a new one of the checkpoint; None after a dry run's plan.

    With JSON nothing is printed of the export: the form's object is the only one.
    """
    if source.bundle is not None:
        return named_bundle(form, source)
    assert source.ckpt is not None
    exported = export_checkpoint(
        source.ckpt, export, precision, (form.command, "--bundle"), verb=form.command
    )
    if exported is None:
        return None
    if not export.as_json:
        print_exported(exported, as_json=False, is_last=False)
    return exported.bundle


def student_bundle_of(
    form: Form,
    source: StudentSourceOptions,
    export: ExportRequest,
    settings: Mapping[str, object],
    check: Check = lambda bundle, student: None,
) -> tuple[Bundle, Student] | None:
    """For a form that is made of the student: the bundle with it, loaded once.

    None after a dry run, whose plan is printed. A new bundle has no ONNX files, as the form does
    not read them; `check` may refuse it early.
    """
    from tiue_export.export.own_student import open_student
    from tiue_export.methods.load import CheckpointRequest

    assert source.ckpt is not None
    if source.bundle is None:
        instead = (form.command, "--ckpt", source.ckpt, "--bundle")
        exported = export_checkpoint(
            source.ckpt, export, "fp32", instead, verb=form.command, from_student=check
        )
        if exported is None:
            print_form_plan(form, None, settings, as_json=export.as_json)
            return None
        assert exported.student is not None
        if not export.as_json:
            print_contract(exported)
        return exported.bundle, exported.student
    bundle = named_bundle(form, source)
    if export.dry_run:
        print_form_plan(form, bundle, settings, as_json=export.as_json)
        return None
    if form.folder in bundle.manifest.compiled and not export.force:
        raise BundleError(
            f"{bundle.root} has {VERBS[form.command]} already", "Pass --force to make them again."
        )
    request = CheckpointRequest(
        source.ckpt, export.base, export.vae, lora=export.lora, embedding=export.embedding
    )
    with stage_bar(quiet=export.as_json) as bar, stage(bar.observer(), "load student"):
        student = open_student(request, bundle.manifest, lambda part: bar.begin(f"load {part}"))
    return bundle, student


def print_form_plan(
    form: Form, bundle: Bundle | None, settings: Mapping[str, object], *, as_json: bool
) -> None:
    """What would be made; without a bundle a line below the plan of its export."""
    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    if bundle is None:
        if not as_json:  # one object, which the export's plan was
            console.print(f"then {form.title}: {words}", markup=False)
        return
    if as_json:
        print_json(form_plan(form, bundle, settings))
        return
    graphs, lacking = bundle.manifest.graphs, to_make(form, bundle)
    title = f"Plan for {form.title} (nothing was made)"
    table = titled(title, "graph", "ONNX", form.title)
    for name, graph in graphs.items():
        onnx = megabytes(graph.size_bytes) if graph.has_onnx else "none"
        table.add_row(name, onnx, "to make" if name in lacking else "there; --force anew")
    console.print(table)
    console.print(f"with {words}", markup=False)


def form_plan(form: Form, bundle: Bundle, settings: Mapping[str, object]) -> dict[str, object]:
    """What would be made, for JSON."""
    return {
        "bundle": str(bundle.root),
        "form": form.folder,
        "exists": not to_make(form, bundle),
        "graphs": list(bundle.manifest.graphs),
        "settings": settings,
    }


def to_make(form: Form, bundle: Bundle, *, force: bool = False) -> list[str]:
    """The graphs that the bundle does not have in this form, or with `force` all."""
    compiled = None if force else bundle.manifest.compiled.get(form.folder)
    return [name for name in bundle.manifest.graphs if not compiled or name not in compiled.graphs]


def form_table(form: Form, bundle: Bundle) -> Table:
    """Each graph of a compiled form with its size, and what making it took."""
    columns = (*fixed("graph"), *numbers("size", "convert s", "peak memory"))
    table = titled(f"{bundle.root}/{form.folder}", *columns)
    for graph, compiled in bundle.manifest.compiled[form.folder].graphs.items():
        table.add_row(
            graph,
            megabytes(compiled.size_bytes),
            f"{compiled.report['convert_s']:.1f}",
            megabytes(float(compiled.report["peak_memory_bytes"])),
        )
    return table


def make_form(
    form: Form,
    export: ExportRequest,
    make: Callable[..., Bundle],
    stages: int,
    start: float,
    *,
    table: Callable[[Form, Bundle], Table] = form_table,
) -> None:
    """Make the form behind a bar of `stages`, then print it and what it proved, or JSON.

    `start` is when the command began.
    """
    bundle = made_form(export, make, stages)
    seconds = time.perf_counter() - start
    if export.as_json:
        print_json({**form_record(form, bundle), "seconds": round(seconds, 1)})
        return
    print_form(form, bundle, seconds, table=table)


def made_form(export: ExportRequest, make: Callable[..., Bundle], stages: int) -> Bundle:
    """The bundle with a form that `make` adds, behind a bar of `stages`."""
    with stage_bar(quiet=export.as_json) as bar:
        bar.expect(stages)
        return make(
            force=export.force,
            allow_parity_loss=export.allow_parity_loss,
            observer=bar.observer(),
        )


def form_record(form: Form, bundle: Bundle) -> dict[str, object]:
    """What the manifest says of a form, for JSON."""
    return {
        "bundle": str(bundle.root),
        **dataclasses.asdict(bundle.manifest.compiled[form.folder]),
    }


def print_form(
    form: Form,
    bundle: Bundle,
    seconds: float,
    *,
    table: Callable[[Form, Bundle], Table] = form_table,
) -> None:
    """A form's graphs, what they proved, and what to type next."""
    compiled = bundle.manifest.compiled[form.folder]
    console.print(table(form, bundle))
    title = f"{form.proof or form.title} {compiled.version} against the student"
    if compiled.parity:
        console.print(parity_table(compiled.parity, title))
        if form.remark:
            console.print(form.remark, soft_wrap=True)
    if not form.device:
        print_next(draw_line(bundle, f"--runtime {form.command}"))
        return
    there = command_line("parity", bundle.root, "--runtime", form.command)
    console.print(
        f"[bold green]Done[/] in {seconds:.0f} s. {form.device}:  {escape(there)}",
        highlight=False,
        soft_wrap=True,
    )
