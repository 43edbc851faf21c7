"""`tiue-export coreml`: Core ML packages for a bundle, from its checkpoint, each proven here."""

from __future__ import annotations

import dataclasses
import shlex
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.folder import Bundle, open_bundle
from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import BundleError, UsageError
from tiue_export.export.coreml.profiles import (
    CoremlOptions,
    check_loop,
    in_our_words,
    plan_coreml,
    size_named,
)
from tiue_export.registry.packages import EXPORT_NEEDS, require

from .draw.prompt_file import prompts_in
from .export_onnx import ExportRequest, export_first
from .method_options import MethodRequest
from .report.stages import stage_bar
from .report.tables import console, megabytes, parity_table, print_json

_LATENT_PX = 8


@dataclass(frozen=True)
class CoremlRequest:
    """The options of `tiue-export coreml`; None is the profile's own setting."""

    ckpt: str | None = None
    bundle: Path | None = None
    out: Path | None = None
    base: str | None = None
    vae: str | None = None
    steps: int | None = None
    method: MethodRequest = field(default_factory=MethodRequest)
    profile: str = "mac-gpu"
    target: str | None = None
    attention: str | None = None
    linear: str | None = None
    decoder_batch: int | None = None
    precision: str = "fp16"
    compress: str | None = None
    quantize_nbits: int | None = None
    recipe: Path | None = None
    target_psnr_db: float | None = None
    target_mb: float | None = None
    calibration_prompts: Path | None = None
    compute_unit: str | None = None
    sizes: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    latent_h: int | None = None
    latent_w: int | None = None
    swift_bundle: bool = False
    force: bool = False
    allow_parity_loss: bool = False
    as_json: bool = False


def run(request: CoremlRequest) -> None:
    """Export the bundle first where there is none, then convert, prove, and print."""
    checkpoint = _checkpoint(request)
    request.method.check()
    options = _options(request)
    plan_coreml(options)  # a wrong word is refused before any work
    if request.method.method == "faster":
        check_loop(options)
    require("Core ML export", ("coremltools", "sklearn"), "coreml")
    require("exporting", EXPORT_NEEDS, "export")
    check_checkpoint_path(checkpoint)
    from tiue_export.export.coreml.bundle import (
        FOLDER,
        compile_coreml,
    )
    from tiue_export.export.own_student import StudentPlace

    start = time.perf_counter()
    path = _bundle_path(request, checkpoint, options)
    with stage_bar(quiet=request.as_json) as bar:
        opened = open_bundle(path)
        searched = options.target_psnr_db is not None or options.target_mb is not None
        bar.expect(len(opened.manifest.graphs) + searched)
        bundle = compile_coreml(
            opened,
            StudentPlace(checkpoint, request.base, request.vae, request.method.lora),
            options,
            force=request.force,
            allow_parity_loss=request.allow_parity_loss,
            observer=bar.observer(),
        )
    compiled = bundle.manifest.compiled[FOLDER]
    seconds = round(time.perf_counter() - start, 1)
    if request.as_json:
        print_json({"bundle": str(path), **dataclasses.asdict(compiled), "seconds": seconds})
        return
    console.print(package_table(bundle, FOLDER))
    console.print(
        parity_table(compiled.parity, f"coremltools {compiled.version} against the student")
    )
    console.print(
        "Proven: the packages, executed by tiue-export's own evaluator. Not proven: how a GPU or a "
        "Neural Engine rounds.",
        soft_wrap=True,
    )
    quoted = shlex.quote(str(path))
    console.print(
        f"[bold green]Done[/] in {seconds:.0f} s. On the Mac:  "
        f"tiue-export parity {escape(quoted)} --runtime coreml",
        highlight=False,
        soft_wrap=True,
    )


def _checkpoint(request: CoremlRequest) -> str:
    if request.ckpt is None:
        raise UsageError(
            "--ckpt is missing: Core ML reads no ONNX, so packages are made from the student "
            "itself, also for a bundle that is there",
            "tiue-export coreml --ckpt student.safetensors"
            + (f" --bundle {request.bundle}" if request.bundle else "")
            + " (with --base as at the export).",
        )
    return request.ckpt


def _options(request: CoremlRequest) -> CoremlOptions:
    """The request in the words of the export; Apple's spellings are translated here."""
    compress = request.compress
    if request.quantize_nbits is not None:
        if compress is not None:
            raise UsageError(
                "--quantize-nbits and --compress were both given; they mean the same",
                f"Keep --compress palettize-{request.quantize_nbits}.",
            )
        if request.quantize_nbits not in (4, 6, 8):
            raise UsageError(
                f"--quantize-nbits is {request.quantize_nbits}; expected 4, 6 or 8",
                "Fewer bits per layer are chosen by --target-mb.",
            )
        compress = f"palettize-{request.quantize_nbits}"
    recipe: dict[str, dict[str, int]] = {}
    if request.recipe is not None:
        require("reading a recipe", EXPORT_NEEDS, "export")
        from tiue_export.export.coreml.recipe import read_recipe

        recipe = {graph: dict(bits) for graph, bits in read_recipe(request.recipe).items()}
    return CoremlOptions(
        profile=request.profile,
        target=request.target,
        attention=request.attention,
        linear=request.linear,
        decoder_batch=request.decoder_batch,
        precision=in_our_words(request.precision),
        compress=compress,
        compute_unit=request.compute_unit,
        sizes=tuple(map(size_named, request.sizes)),
        target_psnr_db=request.target_psnr_db,
        target_mb=request.target_mb,
        recipe=recipe,
        prompts=tuple(prompts_in(request.calibration_prompts, "--calibration-prompts")),
        swift_bundle=request.swift_bundle,
    )


def _side(pixels: int | None, latent: int | None, name: str) -> int | None:
    """--height, or Apple's --latent-h in eighths of it."""
    if pixels is not None and latent is not None and pixels != latent * _LATENT_PX:
        raise UsageError(
            f"--{name} {pixels} and --latent-{name[0]} {latent} contradict each other",
            f"--latent-{name[0]} is {name} / {_LATENT_PX}; give one of them.",
        )
    return pixels if latent is None else latent * _LATENT_PX


def _bundle_path(request: CoremlRequest, checkpoint: str, options: CoremlOptions) -> Path:
    """The bundle to add to: the one given, or a new one of the first size asked for."""
    height = _side(request.height, request.latent_h, "height")
    width = _side(request.width, request.latent_w, "width")
    if options.sizes and (height or width):
        raise UsageError(
            "--size and --height/--width (--latent-h/--latent-w) were both given",
            "Give every size as --size HEIGHTxWIDTH.",
        )
    if request.bundle is not None:
        _refuse_export_options(request, height, width)
        return request.bundle
    if options.sizes:
        height, width = options.sizes[0]
    asked = ExportRequest(
        checkpoint,
        request.out,
        base=request.base,
        vae=request.vae,
        height=height,
        width=width,
        steps=request.steps,
        # A package of few steps would compute the shared part again for each of its runs.
        hoist="encoder" if request.method.method == "faster" else "decoder",
        method=request.method,
        force=request.force,
        as_json=request.as_json,
    )
    out = export_first(asked, f"coreml --ckpt {shlex.quote(checkpoint)} --bundle")
    assert out is not None  # it was no dry run
    return out


def _refuse_export_options(request: CoremlRequest, height: int | None, width: int | None) -> None:
    """What decides the graphs was decided when the bundle was made."""
    manifest = open_bundle(request.bundle).manifest if request.bundle is not None else None
    given = {
        "--out": request.out is not None,
        "--steps": request.steps is not None,
        "--height": manifest is not None and height not in (None, manifest.height_px),
        "--width": manifest is not None and width not in (None, manifest.width_px),
        "--method and what goes with it": replace(request.method, lora=()) != MethodRequest(),
    }
    named = [flag for flag, was_given in given.items() if was_given]
    if named:
        raise BundleError(
            f"{request.bundle} exists, with its own size and steps; {', '.join(named)} would "
            "change them",
            "Leave it out, or export anew without --bundle. More sizes: --size HEIGHTxWIDTH.",
        )


def package_table(bundle: Bundle, folder: str) -> Table:
    """Each package with its size, operations and largest activation."""
    compiled = bundle.manifest.compiled[folder]
    flags = compiled.flags
    title = (
        f"{bundle.root}/{folder}: {flags['profile']}, {flags['target']}, {flags['attention']}, "
        f"{flags['linear']}, decoder batch {flags['decoder_batch']}, {flags['compute_unit']}"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("package", no_wrap=True)
    table.add_column("weights in")
    for column in ("size", "max |x|", "ops", "convert s", "prove s", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("most frequent", overflow="fold")
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
