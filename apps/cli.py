"""The `tiue-export` command line. Each command imports its code when it runs: help stays fast."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiue_export._version import __version__

from .failures import explained

app = typer.Typer(
    name="tiue-export",
    help=(
        "Take a distilled one-pass Stable Diffusion student (TiUE) to a device, with proof.\n\n"
        "A checkpoint becomes a bundle of verified graphs; a bundle draws pictures without torch."
    ),
    epilog="First steps: tiue-export demo   |   exit codes: docs/errors.md",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bundle_app = typer.Typer(
    help=(
        "Carry a bundle to a device: one .tar with what it needs, and back.\n\n"
        "Example:  tiue-export bundle pack fox --runtime trt"
    ),
    no_args_is_help=True,
)
app.add_typer(bundle_app, name="bundle")

# Shared options: the same flag means the same in every command.
Checkpoint = Annotated[
    str, typer.Option("--ckpt", help="Student: .safetensors file, diffusers folder or hub id.")
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Pipeline folder or hub id for what the checkpoint lacks."),
]
Vae = Annotated[
    str | None,
    typer.Option("--vae", help="Folder of another VAE, such as TAESD; tiny:FOLDER insists on one."),
]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        "--low-vram",
        help="Give memory back between operations (trt: one graph at a time); slower.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
RuntimeName = Annotated[
    str, typer.Option("--runtime", help="ort, openvino, trt, torch (needs --ckpt) or fake.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda; with openvino gpu, npu.")]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider", help="With ort: cpu, cuda or rtx (plug-in) \\[default: by --device]."
    ),
]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="All in one launch on a GPU \\[default: trt yes, if it can be; ort no].",
    ),
]
RuntimePrecision = Annotated[
    str,
    typer.Option(
        "--precision", help="auto, fp32, bf16 or fp16, for runtimes that can choose (openvino)."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads \\[default: the runtime's choice].")
]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tiue-export {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
@explained
def onnx(
    ckpt: Checkpoint,
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write \\[default: NAME-PRECISION].")
    ] = None,
    base: Base = None,
    vae: Vae = None,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32 (exact, fastest on CPUs) or fp16 (for GPUs).")
    ] = "fp32",
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Images per run.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch axis open.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="K \\[default: what the checkpoint records, else 4]."),
    ] = None,
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Export a K it was not trained for.")
    ] = False,
    family: Annotated[
        str | None,
        typer.Option("--family", help="sd15, sd21-base, sd21-v, tiny \\[default: recognised]."),
    ] = None,
    no_hoist: Annotated[
        bool, typer.Option("--no-hoist", help="Naive batched decoder, for comparison.")
    ] = False,
    hoist_into: Annotated[
        str,
        typer.Option("--hoist-into", help="Graph for the time-independent part: decoder, encoder."),
    ] = "decoder",
    merge_below: Annotated[
        float, typer.Option("--merge-below", help="Merge decoder rows weighing less (try 0.02).")
    ] = 0.0,
    vae_precision: Annotated[
        str,
        typer.Option(
            "--vae-precision", help="auto (as --precision, by the audit), fp16, fp32 or bf16."
        ),
    ] = "auto",
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="fp16 without looking for overflow first.")
    ] = False,
    audit_prompts: Annotated[
        Path | None,
        typer.Option("--audit-prompts", help="More prompts to audit on: text file, one a line."),
    ] = None,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep a bundle that fails a gate.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a student to a verified ONNX bundle.

    Example:  tiue-export onnx --ckpt student.safetensors --base sd21-base/ --out fox
    """
    from .export_onnx import ExportRequest, run

    run(
        ExportRequest(
            ckpt=ckpt,
            out=out,
            base=base,
            vae=vae,
            precision=precision,
            height=height,
            width=width,
            batch=batch,
            dynamic_batch=dynamic_batch,
            steps=steps,
            allow_other_steps=allow_other_steps,
            family=family,
            hoist="none" if no_hoist else hoist_into,
            merge_below=merge_below,
            vae_precision=vae_precision,
            audit=not no_audit,
            audit_prompts=audit_prompts,
            allow_parity_loss=allow_parity_loss,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def audit(
    ckpt: Checkpoint,
    base: Base = None,
    vae: Vae = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Text file, one prompt a line \\[default: two of ours]."),
    ] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="K \\[default: what the checkpoint records, else 4]."),
    ] = None,
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Audit a K it was not trained for.")
    ] = False,
    family: Annotated[
        str | None,
        typer.Option("--family", help="sd15, sd21-base, sd21-v, tiny \\[default: recognised]."),
    ] = None,
    no_hoist: Annotated[bool, typer.Option("--no-hoist", help="Naive batched decoder.")] = False,
    hoist_into: Annotated[
        str,
        typer.Option("--hoist-into", help="Graph for the time-independent part: decoder, encoder."),
    ] = "decoder",
    top: Annotated[int, typer.Option("--top", help="Operations to list for each graph.")] = 10,
    as_json: Json = False,
) -> None:
    """Show how near a student's values come to half precision's limit, and what must stay float32.

    Example:  tiue-export audit --ckpt student.safetensors --base sd21-base/ --prompts prompts.txt
    """
    from .overflow_audit import AuditRequest, run

    run(
        AuditRequest(
            ckpt=ckpt,
            base=base,
            vae=vae,
            prompts=prompts,
            height=height,
            width=width,
            steps=steps,
            allow_other_steps=allow_other_steps,
            family=family,
            hoist="none" if no_hoist else hoist_into,
            top=top,
            as_json=as_json,
        )
    )


@app.command()
@explained
def openvino(
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student to export first; or give --bundle.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle to add OpenVINO graphs to.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With --ckpt: bundle to write \\[default: NAME-fp32]."),
    ] = None,
    base: Base = None,
    vae: Vae = None,
    weights: Annotated[
        str, typer.Option("--weights", help="fp32, or fp16 for files half the size.")
    ] = "fp32",
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Arithmetic to prove \\[default: all this CPU has]."),
    ] = None,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep graphs that fail a gate.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Add OpenVINO graphs to a bundle: the fastest way to run a student on an Intel or AMD CPU.

    Example:  tiue-export openvino --bundle fox

    Example:  tiue-export openvino --ckpt student.safetensors --base sd21-base/ --out fox
    """
    from .export_openvino import OpenvinoRequest, run

    run(
        OpenvinoRequest(
            ckpt=ckpt,
            bundle=bundle,
            out=out,
            base=base,
            vae=vae,
            weights=weights,
            precisions=tuple(precision or ()),
            allow_parity_loss=allow_parity_loss,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def trt(
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student to export first; or give --bundle.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle to add engines to; needs no torch.")
    ] = None,
    base: Base = None,
    vae: Vae = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With --ckpt: bundle to write \\[default: NAME-fp16]."),
    ] = None,
    flavor: Annotated[
        str,
        typer.Option(
            "--flavor", help="tensorrt (Jetson, servers; on the device), rtx, or what is installed."
        ),
    ] = "auto",
    sm: Annotated[
        str | None,
        typer.Option(
            "--sm", help="rtx: GPUs to build for \\[default: this one, else Ampere and up]."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp16 or fp32 \\[default: the bundle's, or fp16]."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Images per run: 1, or min:opt:max such as 1:2:4.")
    ] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels, with --ckpt.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels, with --ckpt.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="K, with --ckpt.")] = None,
    optimization_level: Annotated[
        int, typer.Option("--optimization-level", help="0 to 5: build time against speed.")
    ] = 3,
    workspace_mb: Annotated[
        int, typer.Option("--workspace-mb", help="Builder's scratch memory; 0: what is free.")
    ] = 0,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines for newer TensorRTs too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Engines for any Ampere or newer GPU.")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="Engines whose weights can be swapped later.")
    ] = False,
    refit_from: Annotated[
        str | None,
        typer.Option("--refit-from", help="Student or bundle whose weights to put into engines."),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is valid already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines: on the device, or for RTX cards anywhere, without a GPU.

    Engines that are valid already are kept; precision is proven layer by layer.

    Example:  tiue-export trt --ckpt student.safetensors --base sd21-base/

    Example:  tiue-export trt --bundle fox --flavor rtx --sm 86,89,120

    Example:  tiue-export trt --bundle fox --refit-from tuned.safetensors --out tuned
    """
    from .export_trt import TrtRequest, run

    run(
        TrtRequest(
            ckpt=ckpt,
            bundle=bundle,
            base=base,
            vae=vae,
            out=out,
            flavor=flavor,
            sm=sm,
            precision=precision,
            batch=batch,
            height=height,
            width=width,
            steps=steps,
            optimization_level=optimization_level,
            workspace_mb=workspace_mb,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            refit=refit,
            refit_from=refit_from,
            rebuild=rebuild,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def generate(
    bundle: BundleArgument,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts.", show_default=False)
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, one prompt a line.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Picture i uses seed + i \\[default: 0].")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Pictures per prompt.")] = 1,
    out: Annotated[
        Path, typer.Option("--out", help="Folder, or a .png path for a single picture.")
    ] = Path("pictures"),
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", help="Also write one .png: prompts down, seeds across."),
    ] = None,
    latents: Annotated[
        Path | None, typer.Option("--latents", help="Initial noise as .npy, instead of a seed.")
    ] = None,
    time_stages: Annotated[
        bool, typer.Option("--time", help="Print the time of each stage.")
    ] = False,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    precision: RuntimePrecision = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    provider: Provider = None,
    cuda_graph: CudaGraph = None,
    ckpt: Annotated[str | None, typer.Option("--ckpt", help="Student for --runtime torch.")] = None,
    base: Base = None,
    vae: Vae = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from a bundle: no torch needed.

    Example:  tiue-export generate fox "a red fox in the snow" --seed 7 --count 4
    """
    from .generate import GenerateRequest, run

    run(
        GenerateRequest(
            bundle=bundle,
            prompts=tuple(prompts or ()),
            prompts_file=prompts_file,
            seed=seed,
            count=count,
            out=out,
            sheet=sheet,
            latents=latents,
            time_stages=time_stages,
            runtime=runtime,
            device=device,
            precision=precision,
            threads=threads,
            low_memory=low_memory,
            provider=provider,
            cuda_graph=cuda_graph,
            ckpt=ckpt,
            base=base,
            vae=vae,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def parity(
    bundle: BundleArgument,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    precision: RuntimePrecision = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    provider: Provider = None,
    cuda_graph: CudaGraph = None,
    ckpt: Annotated[str | None, typer.Option("--ckpt", help="Student for --runtime torch.")] = None,
    base: Base = None,
    vae: Vae = None,
    as_json: Json = False,
) -> None:
    """Hold a runtime on this machine against the reference stored in the bundle.

    Example:  tiue-export parity fox --runtime ort --device cuda
    """
    from tiue_export.specs import RuntimeOptions

    from .parity_check import run

    options = RuntimeOptions(
        device=device,
        threads=threads,
        low_memory=low_memory,
        precision=precision,
        checkpoint=ckpt,
        base=base,
        vae=vae,
        provider=provider,
        cuda_graph=cuda_graph,
    )
    run(bundle, runtime, options, as_json)


@app.command()
@explained
def bench(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundle folders.", show_default=False)
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="ort, openvino, trt, torch \\[default: all that can run]."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="For openvino: fp32, bf16 \\[default: all this CPU has]."),
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            "--contenders",
            help="bundles, official, torch-bf16, torch-compile, one-step, four-step, fifty-step, "
            "rows-8, sd-cpp, METHOD/RUNTIME/PRECISION or all; all but bundles need --ckpt.",
        ),
    ] = None,
    ratio_to: Annotated[
        list[str] | None,
        typer.Option("--ratio-to", help="Contender to divide by \\[default: the first]."),
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="The same weights, for contenders in PyTorch.")
    ] = None,
    base: Base = None,
    vae: Vae = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each contender.")] = 5,
    runs: Annotated[int, typer.Option("--runs", help="Timed runs a turn.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Untimed runs before them.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, auto.")] = "cpu",
    threads: Threads = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels, without bundles.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels, without bundles.")] = None,
    unet_only: Annotated[
        bool, typer.Option("--unet-only/--vae-too", help="Leave out text encoder and VAE.")
    ] = False,
    reload: Annotated[
        bool, typer.Option("--reload", help="One process at a time: least memory, slower.")
    ] = False,
    peak: Annotated[
        list[str] | None,
        typer.Option("--peak", help="bf16=1.1: TFLOP/s of this machine \\[default: measured]."),
    ] = None,
    no_peak: Annotated[bool, typer.Option("--no-peak", help="Do not measure the peak.")] = False,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder that keeps graphs made for measuring."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for one turn.")] = 3600.0,
    out: Annotated[Path | None, typer.Option("--out", help="Record to write (.json).")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Table to write.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture to write (.png).")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Two records, before and now, instead of measuring."),
    ] = None,
    fail_if_slower: Annotated[
        str | None,
        typer.Option("--fail-if-slower", help="5%: exit code 11 if anything got slower by more."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure latency and memory side by side: each contender in its own process, in turn.

    Lists may be given between commas.

    Example:  tiue-export bench fox --ckpt student.safetensors --base sd21-base/ --out now.json

    Example:  tiue-export bench old new --unet-only --fail-if-slower 5%

    Example:  tiue-export bench --compare before.json now.json --fail-if-slower 5%
    """
    from .bench import BenchRequest, run

    def listed(values: list[str] | None) -> tuple[str, ...]:
        return tuple(part for value in values or () for part in value.split(",") if part)

    run(
        BenchRequest(
            bundles=tuple(bundles or ()),
            runtimes=listed(runtime),
            precisions=listed(precision),
            contenders=listed(contenders),
            ratios_to=listed(ratio_to),
            device=device,
            ckpt=ckpt,
            base=base,
            vae=vae,
            rounds=rounds,
            runs=runs,
            warmup=warmup,
            threads=threads,
            height=height,
            width=width,
            unet_only=unet_only,
            reload=reload,
            peaks=listed(peak),
            measure_peak=not no_peak,
            work=work,
            timeout_s=timeout,
            out=out,
            markdown=markdown,
            plot=plot,
            compare=compare,
            fail_if_slower=fail_if_slower,
            as_json=as_json,
        )
    )


@app.command()
@explained
def inspect(bundle: BundleArgument, as_json: Json = False) -> None:
    """Show what a bundle holds: graphs, constants, parity, origin. Verifies every file.

    Example:  tiue-export inspect fox
    """
    from .inspection import run

    run(bundle, as_json)


@app.command()
@explained
def doctor(as_json: Json = False) -> None:
    """Say what is installed and which runtimes can run here, and why not.

    Example:  tiue-export doctor
    """
    from .doctor import run

    run(as_json)


@app.command()
@explained
def distill(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; see docs/training.md.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder \\[default: the file's `out`].")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", help="Stop after this many \\[default: the file's]."),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List the presets a configuration can name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a TiUE student from a teacher. Run the same line again to resume.

    On several GPUs or machines, put `accelerate launch -m tiue_export` for `tiue-export`.

    Example:  tiue-export distill student.toml
    """
    from .distill import run

    overrides = {"out": None if out is None else str(out), "iterations": iterations}
    given = {key: value for key, value in overrides.items() if value is not None}
    run(config, given, presets, as_json)


@app.command()
@explained
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    force: Force = False,
) -> None:
    """See it all in a minute: make a tiny student, export it, prove it, draw a picture.

    Example:  tiue-export demo
    """
    from .demo import run

    run(out, force)


@bundle_app.command()
@explained
def pack(
    bundle: BundleArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Archive to write \\[default: NAME.tar].")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime", help="Only what it needs: ort, trt, rtx, openvino \\[default: all]."
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Pack a bundle into one .tar, with only what a device needs.

    For trt the ONNX graphs, as its engines are built on the device; for rtx the engines alone.

    Example:  tiue-export bundle pack fox --runtime trt
    """
    from .bundle_archive import pack as run

    run(bundle, out, runtime, force=force, as_json=as_json)


@bundle_app.command()
@explained
def unpack(
    archive: Annotated[Path, typer.Argument(help="Archive of bundle pack.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write \\[default: the archive's name].")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Unpack an archive; every file is verified before the bundle appears.

    Example:  tiue-export bundle unpack fox-trt.tar
    """
    from .bundle_archive import unpack as run

    run(archive, out, force=force, as_json=as_json)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the process's own."""
    # Our optimum plugin lives in optimum's namespace, which diffusers remarks on when imported.
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    # A plain SIGTERM would skip the clean-up of an unfinished export.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(args=sys.argv[1:] if arguments is None else arguments)
