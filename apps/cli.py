"""The `tiue-export` command line. Each command imports its code when it runs: help stays fast."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from tiue_export._version import __version__

from .completion import bundle_folders, runtime_names
from .failures import explained
from .welcome import panel_of

app = typer.Typer(
    name="tiue-export",
    help=(
        "Take a distilled one-pass Stable Diffusion student (TiUE) to a device, with proof.\n\n"
        "A checkpoint becomes a bundle of verified graphs; a bundle draws pictures without torch."
    ),
    epilog="First steps: tiue-export init   |   exit codes: docs/errors.md",
    invoke_without_command=True,
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
app.add_typer(bundle_app, name="bundle", rich_help_panel=panel_of("bundle"))

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
BundleArgument = Annotated[
    Path,
    typer.Argument(help="Bundle folder.", show_default=False, autocompletion=bundle_folders),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", help="tiue: a distilled student; faster: any SD 1.x/2.x, Faster Diffusion."
    ),
]
SchedulerName = Annotated[
    str | None,
    typer.Option("--scheduler", help="faster: ddim, dpmpp or pndm \\[default: ddim]."),
]
KeySteps = Annotated[
    str | None,
    typer.Option(
        "--key-steps",
        help="faster: steps that run the encoder: nonuniform, uniform:N, 0,1,2,... or auto.",
    ),
]
Inject = Annotated[
    str | None,
    typer.Option(
        "--inject", help="faster: prior noise: off, on, parallel, sequential \\[default: on]."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="faster: scale, 1 is none \\[default: the bundle's, 7.5]."),
]
DecoderRows = Annotated[
    int | None,
    typer.Option("--max-decoder-rows", help="faster: rows of one decoder run; less memory."),
]
Budget = Annotated[
    float | None,
    typer.Option("--budget", help="auto: share of plain sampling's operations, such as 0.7."),
]
ControlNet = Annotated[
    str | None,
    typer.Option("--controlnet", help="faster: diffusers folder of a ControlNet to steer by."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option("--lora", help="FILE[:SCALE] to merge first, diffusers or kohya; repeatable."),
]
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
    str,
    typer.Option(
        "--runtime",
        help="ort, openvino, trt, torch (needs --ckpt) or fake.",
        autocompletion=runtime_names,
    ),
]
RuntimeOrAuto = Annotated[
    str,
    typer.Option(
        "--runtime",
        help="ort, openvino, trt, torch (needs --ckpt), fake, or auto: the fastest here, measured "
        "once and remembered.",
        autocompletion=runtime_names,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda; with openvino gpu, npu; with coreml gpu, ane, evaluator."
    ),
]
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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Options of the program itself."""
    if context.invoked_subcommand is None:
        from .welcome import run

        run(typer.main.get_command(app).commands, Path())  # type: ignore[attr-defined]


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
    vae_tile: Annotated[
        int | None,
        typer.Option("--vae-tile", help="Decode in tiles of so many pixels, for less memory."),
    ] = None,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="fp16 without looking for overflow first.")
    ] = False,
    audit_prompts: Annotated[
        Path | None,
        typer.Option("--audit-prompts", help="More prompts to audit on: text file, one a line."),
    ] = None,
    method: Method = "tiue",
    scheduler: SchedulerName = None,
    key_steps: KeySteps = None,
    inject: Inject = None,
    guidance: Guidance = None,
    max_decoder_rows: DecoderRows = None,
    budget: Budget = None,
    controlnet: ControlNet = None,
    lora: Lora = None,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep a bundle that fails a gate.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a student, or any Stable Diffusion 1.x/2.x model, to a verified ONNX bundle.

    Example:  tiue-export onnx --ckpt student.safetensors --base sd21-base/ --out fox

    Example:  tiue-export onnx --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from .export_onnx import ExportRequest, run
    from .method_options import MethodRequest

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
            vae_tile=vae_tile,
            audit=not no_audit,
            audit_prompts=audit_prompts,
            allow_parity_loss=allow_parity_loss,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
            method=MethodRequest(
                method=method,
                scheduler=scheduler,
                key_steps=key_steps,
                inject=inject,
                guidance=guidance,
                max_decoder_rows=max_decoder_rows,
                budget=budget,
                controlnet=controlnet,
                lora=tuple(lora or ()),
            ),
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
def analyze(
    ckpt: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="Folder for numbers and pictures.")] = Path(
        "analysis"
    ),
    base: Base = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text file, one a line \\[default: ours].")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Prompts to measure.")] = 4,
    check: Annotated[int, typer.Option("--check", help="More prompts, to judge the lists by.")] = 2,
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the sampler.")] = None,
    scheduler: SchedulerName = None,
    guidance: Guidance = None,
    reach: Annotated[
        int | None, typer.Option("--reach", help="Longest group to measure \\[default: any].")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Share of plain sampling's operations, such as 0.7."),
    ] = None,
    lora: Lora = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure which steps of a model need its encoder, and choose key steps for Faster Diffusion.

    Run the same line again to resume, or with another --budget to choose anew.

    Example:  tiue-export analyze --ckpt sd21-base/ --steps 50 --budget 0.7 --out analysis
    """
    from .analyze import AnalyzeRequest, run

    run(
        AnalyzeRequest(
            ckpt=ckpt,
            out=out,
            base=base,
            prompts=prompts,
            count=count,
            check=check,
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            reach=reach,
            budget=budget,
            lora=tuple(lora or ()),
            height=height,
            width=width,
            force=force,
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
    height: Annotated[int | None, typer.Option("--height", help="Pixels, with --ckpt.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels, with --ckpt.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="With --ckpt: K, or the loop's steps.")
    ] = None,
    method: Method = "tiue",
    scheduler: SchedulerName = None,
    key_steps: KeySteps = None,
    inject: Inject = None,
    guidance: Guidance = None,
    max_decoder_rows: DecoderRows = None,
    budget: Budget = None,
    controlnet: ControlNet = None,
    lora: Lora = None,
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

    Example:  tiue-export openvino --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from .export_openvino import OpenvinoRequest, run
    from .method_options import MethodRequest

    run(
        OpenvinoRequest(
            ckpt=ckpt,
            bundle=bundle,
            out=out,
            base=base,
            vae=vae,
            height=height,
            width=width,
            steps=steps,
            method=MethodRequest(
                method=method,
                scheduler=scheduler,
                key_steps=key_steps,
                inject=inject,
                guidance=guidance,
                max_decoder_rows=max_decoder_rows,
                budget=budget,
                controlnet=controlnet,
                lora=tuple(lora or ()),
            ),
            weights=weights,
            precisions=tuple(precision or ()),
            allow_parity_loss=allow_parity_loss,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def coreai(
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student; needed with --bundle too.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle of it \\[default: one is exported].")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Without --bundle: bundle to write \\[default: NAME-fp32]."),
    ] = None,
    base: Base = None,
    vae: Vae = None,
    precision: Annotated[
        str, typer.Option("--compute-precision", "--precision", help="fp16 or fp32.")
    ] = "fp16",
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep assets that fail a gate.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Experimental: Core AI assets for macOS and iOS 27, run here by Apple's interpreter.

    Example:  tiue-export coreai --ckpt student.safetensors --base sd21-base/ --out fox

    Example:  tiue-export coreai --ckpt student.safetensors --bundle fox --precision fp32
    """
    from .export_coreai import CoreaiRequest, run

    run(
        CoreaiRequest(
            ckpt=ckpt,
            bundle=bundle,
            out=out,
            base=base,
            vae=vae,
            height=height,
            width=width,
            precision=precision,
            force=force,
            allow_parity_loss=allow_parity_loss,
            as_json=as_json,
        )
    )


@app.command()
@explained
def coreml(
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student; needed with --bundle too.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle of it \\[default: one is exported].")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Without --bundle: bundle to write \\[default: NAME-fp32]."),
    ] = None,
    base: Base = None,
    vae: Vae = None,
    profile: Annotated[
        str, typer.Option("--profile", help="mac-gpu, mac-ane, ipad or iphone; sets what follows.")
    ] = "mac-gpu",
    target: Annotated[
        str | None,
        typer.Option("--min-deployment-target", help="iOS16 to iOS18, or macOS13 to macOS15."),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            "--attention-implementation",
            help="sdpa, split or split-chunked (Apple: ORIGINAL, SPLIT_EINSUM, SPLIT_EINSUM_V2).",
        ),
    ] = None,
    linear: Annotated[
        str | None,
        typer.Option("--linear", help="linear, or conv: channels first, for the Neural Engine."),
    ] = None,
    decoder_batch: Annotated[
        int | None,
        typer.Option("--decoder-batch", help="Timesteps decoded at once: 1, 2 or 4; all exact."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--compute-precision", "--precision", help="fp16 or fp32.")
    ] = "fp16",
    compress: Annotated[
        str | None,
        typer.Option(
            "--compress",
            help="none, palettize-8/-6/-4 (-grouped), int8, int4, w8a8 or recipe.",
        ),
    ] = None,
    quantize_nbits: Annotated[
        int | None, typer.Option("--quantize-nbits", help="8, 6 or 4: --compress palettize-N.")
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", help="Choose bits per layer for latents this near, in dB."),
    ] = None,
    target_mb: Annotated[
        float | None,
        typer.Option("--target-mb", help="Choose bits per layer for a UNet of this size."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Bits per layer from an earlier export.")
    ] = None,
    calibration_prompts: Annotated[
        Path | None,
        typer.Option("--calibration-prompts", help="For w8a8: text file, one prompt a line."),
    ] = None,
    compute_unit: Annotated[
        str | None,
        typer.Option(
            "--compute-unit", help="What to recommend: ALL, CPU_AND_GPU, CPU_AND_NE, CPU_ONLY."
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option("--size", help="HEIGHTxWIDTH in pixels; several make one package (iOS18)."),
    ] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels.")] = None,
    latent_h: Annotated[int | None, typer.Option("--latent-h", help="Height / 8.")] = None,
    latent_w: Annotated[int | None, typer.Option("--latent-w", help="Width / 8.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="K \\[default: what the checkpoint records].")
    ] = None,
    swift_bundle: Annotated[
        bool,
        typer.Option(
            "--swift-bundle",
            "--bundle-resources-for-swift-cli",
            help="Also write vocabulary, constants and compile.sh for Swift.",
        ),
    ] = False,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep packages that fail a gate.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make Core ML packages for Mac, iPhone and iPad: on any machine, and proven on it.

    Each saved package is executed by an evaluator of its own and held against the student.

    Example:  tiue-export coreml --ckpt student.safetensors --base sd21-base/ --profile iphone

    Example:  tiue-export coreml --ckpt student.safetensors --bundle fox --target-mb 450
    """
    from .export_coreml import CoremlRequest, run

    run(
        CoremlRequest(
            ckpt=ckpt,
            bundle=bundle,
            out=out,
            base=base,
            vae=vae,
            steps=steps,
            profile=profile,
            target=target,
            attention=attention,
            linear=linear,
            decoder_batch=decoder_batch,
            precision=precision,
            compress=compress,
            quantize_nbits=quantize_nbits,
            recipe=recipe,
            target_psnr_db=target_psnr,
            target_mb=target_mb,
            calibration_prompts=calibration_prompts,
            compute_unit=compute_unit,
            sizes=tuple(size or ()),
            height=height,
            width=width,
            latent_h=latent_h,
            latent_w=latent_w,
            swift_bundle=swift_bundle,
            force=force,
            allow_parity_loss=allow_parity_loss,
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
        typer.Option(
            "--precision", help="fp16, fp32, or int8 (quantized bundles) \\[default: as is]."
        ),
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
        Path | None,
        typer.Option("--prompts", help="One prompt a line; .tsv, .jsonl or .parquet: in bulk."),
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
    runtime: RuntimeOrAuto = "ort",
    device: Device = "auto",
    precision: RuntimePrecision = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    provider: Provider = None,
    cuda_graph: CudaGraph = None,
    ckpt: Annotated[str | None, typer.Option("--ckpt", help="Student for --runtime torch.")] = None,
    base: Base = None,
    vae: Vae = None,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="Bulk: png (a folder) or tar (WebDataset) \\[default: png]."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Bulk: processes that draw \\[default: 1].")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Bulk: workers on a Ray cluster.")] = False,
    shard_size: Annotated[
        int | None, typer.Option("--shard-size", help="Bulk: pictures per .tar \\[default: 1000].")
    ] = None,
    prompt_column: Annotated[
        str | None,
        typer.Option("--prompt-column", help="Bulk: the table's column \\[default: prompt]."),
    ] = None,
    guidance: Guidance = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="faster: what the picture shall not show.")
    ] = None,
    max_decoder_rows: DecoderRows = None,
    control: Annotated[
        Path | None, typer.Option("--control", help="Picture a ControlNet follows (edges, depth).")
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option("--control-scale", help="How strongly \\[default: 1].")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw pictures from a bundle: no torch needed.

    Example:  tiue-export generate fox "a red fox in the snow" --seed 7 --count 4

    Example:  tiue-export generate fox --prompts coco.tsv --format tar --workers 2 --out coco
    """
    from .bulk.options import BulkOptions, bulk_request, in_bulk
    from .generate import GenerateRequest, run, with_resolved_runtime

    bulk = BulkOptions(file_format, shard_size, workers, prompt_column, ray)
    request = GenerateRequest(
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
        guidance=guidance,
        negative_prompt=negative,
        max_decoder_rows=max_decoder_rows,
        control=control,
        control_scale=control_scale,
        force=force,
        as_json=as_json,
    )
    if in_bulk(request, bulk):
        from .bulk.drawing_run import run as draw_in_bulk

        request = with_resolved_runtime(request)
        draw_in_bulk(bulk_request(request, bulk))
    else:
        run(request)


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
        typer.Option(
            "--ratio-to",
            help="Contender to divide by, or a method: in each one's runtime and precision "
            "\\[default: the first].",
        ),
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
def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Token to ask for \\[default: TIUE_EXPORT_TOKEN]."),
    ] = None,
    model_name: Annotated[
        list[str] | None,
        typer.Option("--model-name", help="Further names that clients may ask for."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", help="Pictures that may wait; more are refused with 429.")
    ] = 64,
    max_pictures: Annotated[int, typer.Option("--max-pictures", help="Pictures per request.")] = 10,
    max_prompt: Annotated[int, typer.Option("--max-prompt", help="Characters of a prompt.")] = 1000,
    max_request_bytes: Annotated[
        int, typer.Option("--max-request-bytes", help="Size of a request's body.")
    ] = 65536,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds from a request to its pictures.")
    ] = 120.0,
    batch_wait: Annotated[
        float,
        typer.Option("--batch-wait", help="Milliseconds a run waits for company, batch above 1."),
    ] = 5.0,
    urls: Annotated[
        bool, typer.Option("--urls", help="Allow response_format url: keep pictures for an hour.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host", help="Host header to answer \\[default: all; on loopback, its own]."
        ),
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Serve on Ray Serve.")] = False,
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="With --ray: copies of the runtime.")
    ] = None,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    precision: RuntimePrecision = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    provider: Provider = None,
    cuda_graph: CudaGraph = None,
    as_json: Json = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's images API: existing clients draw from it.

    Example:  tiue-export serve fox --port 8000

    Example:  tiue-export serve fox --runtime trt --host 0.0.0.0 --token-file token.txt
    """
    from tiue_export.specs import RuntimeOptions

    from .server.serving import ServeRequest, run
    from .server.settings import ServerLimits

    run(
        ServeRequest(
            bundle=bundle,
            host=host,
            port=port,
            limits=ServerLimits(
                queue_pictures=queue,
                pictures_per_request=max_pictures,
                prompt_characters=max_prompt,
                request_bytes=max_request_bytes,
                timeout_s=timeout,
                batch_wait_ms=batch_wait,
            ),
            model_names=tuple(model_name or ()),
            allowed_hosts=tuple(allowed_host or ()),
            urls=urls,
            token_file=token_file,
            ray=ray,
            replicas=replicas,
            runtime=runtime,
            options=RuntimeOptions(
                device=device,
                threads=threads,
                low_memory=low_memory,
                precision=precision,
                provider=provider,
                cuda_graph=cuda_graph,
            ),
            as_json=as_json,
        )
    )


@app.command()
@explained
def studio(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundle folders.", show_default=False, autocompletion=bundle_folders),
    ] = None,
    runtime: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            autocompletion=runtime_names,
            help="Offer this one only; repeatable \\[default: all that run].",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the history \\[default: gone when it ends]."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 lets a phone in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes a free one.")] = 7860,
    device: Device = "auto",
    threads: Threads = None,
    low_memory: LowMemory = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the browser too.")] = False,
    as_json: Json = False,
) -> None:
    """Try a student in the browser: draw while typing, compare runtimes, read the bundle.

    Example:  tiue-export studio fox --open

    Example:  tiue-export studio fox-fp32 fox-fp16 --out pictures
    """
    from .studio.serving import StudioRequest, run

    run(
        StudioRequest(
            bundles=tuple(bundles or ()),
            runtimes=tuple(runtime or ()),
            out=out,
            host=host,
            port=port,
            device=device,
            threads=threads,
            low_memory=low_memory,
            open_browser=open_browser,
            as_json=as_json,
        )
    )


@app.command()
@explained
def calibrate(
    bundle: BundleArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write \\[default: NAME-calibration].")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Text, TSV, JSONL or parquet \\[default: a list of ours]."),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="Field of --prompts \\[default: prompt, text].")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", help="Prompts to take \\[default: 64].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Prompt i uses seed + i.")] = 0,
    runtime: RuntimeName = "ort",
    device: Device = "auto",
    threads: Threads = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the size, write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Capture what real prompts feed the UNet, for `quantize`. Run the same line again to resume.

    Example:  tiue-export calibrate fox --prompts prompts.txt --out fox-calibration
    """
    from .calibrate import CalibrateRequest, run

    run(
        CalibrateRequest(
            bundle=bundle,
            out=out,
            prompts=prompts,
            column=column,
            count=count,
            seed=seed,
            runtime=runtime,
            device=device,
            threads=threads,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def quantize(
    bundle: BundleArgument,
    calibration: Annotated[
        Path, typer.Option("--calibration", help="Folder that `calibrate` wrote.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write \\[default: NAME-KIND].")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="w8a8, hybrid (linear layers: weights only), int8-weights, 4-bit."
        ),
    ] = "w8a8",
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnx: Q/DQ for ort, trt, openvino; openvino: by NNCF."),
    ] = "onnx",
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", help="dB that the latents shall keep \\[default: 35]."),
    ] = None,
    ranges: Annotated[
        str, typer.Option("--ranges", help="min-max, percentile or entropy.")
    ] = "percentile",
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="In percent \\[default: 99.99].")
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option("--smooth", help="SmoothQuant's alpha, folded exactly \\[default: 0.5]."),
    ] = None,
    no_smooth: Annotated[bool, typer.Option("--no-smooth", help="Fold nothing.")] = False,
    sensitivity: Annotated[
        str,
        typer.Option("--sensitivity", help="Quantize alone: each layer, each block, or none."),
    ] = "layer",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Replay this plan, edited or not.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write no bundle; see --save-plan.")
    ] = False,
    save_plan: Annotated[
        Path | None, typer.Option("--save-plan", help="Write the plan here too (.json).")
    ] = None,
    scales: Annotated[
        str, typer.Option("--scales", help="fp32: casts around Q/DQ in half graphs.")
    ] = "auto",
    held_out: Annotated[
        int | None, typer.Option("--held-out", help="Runs kept for judging \\[default: 4].")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="Judge on ort or openvino.")
    ] = None,
    precision: RuntimePrecision = "auto",
    device: Annotated[str, typer.Option("--device", help="Judge on cpu or cuda.")] = "cpu",
    threads: Threads = None,
    low_memory: LowMemory = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Timed runs of each \\[default: 5].")
    ] = None,
    any_speed: Annotated[
        bool, typer.Option("--any-speed", help="For another device: judge quality alone.")
    ] = False,
    allow_parity_loss: Annotated[
        bool, typer.Option("--allow-parity-loss", help="Keep a bundle below its gate.")
    ] = False,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Keep a bundle that is no gain here.")
    ] = False,
    plots: Annotated[
        Path | None, typer.Option("--plots", help="Folder for two pictures (.png).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize the UNet where it is proven: close enough, and faster on this machine.

    Example:  tiue-export quantize fox --calibration fox-calibration --out fox-int8

    Example:  tiue-export quantize fox --calibration fox-calibration --backend openvino

    Example:  tiue-export quantize half --calibration fox-calibration --plan plan.json --any-speed
    """
    from .quantize import QuantizeRequest, run

    run(
        QuantizeRequest(
            bundle=bundle,
            calibration=calibration,
            out=out,
            kind=kind,
            backend=backend,
            target_psnr=target_psnr,
            ranges=ranges,
            percentile=percentile,
            smooth=smooth,
            no_smooth=no_smooth,
            sensitivity=sensitivity,
            plan=plan,
            plan_only=plan_only,
            save_plan=save_plan,
            scales=scales,
            held_out=held_out,
            runtime=runtime,
            precision=precision,
            device=device,
            threads=threads,
            low_memory=low_memory,
            rounds=rounds,
            any_speed=any_speed,
            allow_parity_loss=allow_parity_loss,
            allow_slower=allow_slower,
            plots=plots,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
@explained
def triton(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for the repository.")],
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnxruntime, or tensorrt for a bundle with engines."),
    ] = "onnxruntime",
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the ensemble \\[default: the bundle's folder]."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Largest batch, if the bundle's is dynamic.")
    ] = 4,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a bundle as a model repository for NVIDIA Triton: each graph, and an ensemble.

    Example:  tiue-export triton fox --out repo/
    """
    from .triton_repository import TritonRequest, run

    run(
        TritonRequest(
            bundle=bundle,
            out=out,
            backend=backend,
            name=name,
            max_batch=max_batch,
            force=force,
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
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete instead of listing.")] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only this kind, as the list names it.")
    ] = None,
    unused_days: Annotated[
        float | None, typer.Option("--unused-days", help="Only what was not used for so long.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is kept on this machine for quicker starts, or delete it.

    Example:  tiue-export cache

    Example:  tiue-export cache --clear --kind openvino --unused-days 30
    """
    from .cache import run

    run(clear, kind, unused_days, as_json)


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
def init(
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, arm, rtx, nvidia, jetson, mac \\[default: asked]."),
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student or model \\[default: asked].")
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Say which commands take a checkpoint to a device: asks for both, changes nothing.

    Example:  tiue-export init

    Example:  tiue-export init --device jetson --ckpt student.safetensors --base sd21-base/
    """
    from .init import run

    run(device, ckpt, base, typer.main.get_command(app).commands, as_json)  # type: ignore[attr-defined]


@app.command()
@explained
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for everything it makes.")] = Path(
        "demo"
    ),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """See it all in a minute: make a tiny student, export it, prove it, draw a picture.

    Example:  tiue-export demo
    """
    from .demo import run

    run(out, force, as_json)


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


for _command in app.registered_commands:
    _command.rich_help_panel = panel_of(
        _command.name or (_command.callback.__name__ if _command.callback else "")
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; `arguments` default to the process's own."""
    # A plain SIGTERM would skip the clean-up of an unfinished export.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(args=sys.argv[1:] if arguments is None else arguments)
