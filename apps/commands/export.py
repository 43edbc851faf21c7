"""Commands that make bundles and their compiled forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import (
    Base,
    Budget,
    Checkpoint,
    ControlNet,
    DecoderRows,
    Family,
    Force,
    Guidance,
    Height,
    HoistInto,
    Inject,
    Json,
    KeySteps,
    Lora,
    Method,
    SchedulerName,
    Steps,
    Vae,
    Width,
)

app = typer.Typer()

# Options of two commands here.
ConvertedStudent = Annotated[
    str | None, typer.Option("--ckpt", help="Student; needed with --bundle too.")
]
ConvertedBundle = Annotated[
    Path | None, typer.Option("--bundle", help="Bundle of it \\[default: one is exported].")
]
ConvertedOut = Annotated[
    Path | None,
    typer.Option("--out", help="Without --bundle: bundle to write \\[default: NAME-fp32]."),
]
ComputePrecision = Annotated[
    str, typer.Option("--compute-precision", "--precision", help="fp16 or fp32.")
]
StudentFirst = Annotated[
    str | None, typer.Option("--ckpt", help="Student to export first; or give --bundle.")
]


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
    height: Height = None,
    width: Width = None,
    batch: Annotated[int, typer.Option("--batch", help="Images per run.")] = 1,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch axis open.")
    ] = False,
    steps: Steps = None,
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Export a K it was not trained for.")
    ] = False,
    family: Family = None,
    no_hoist: Annotated[
        bool, typer.Option("--no-hoist", help="Naive batched decoder, for comparison.")
    ] = False,
    hoist_into: HoistInto = "decoder",
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
    from ..export_onnx import ExportRequest, run
    from ..method_options import MethodRequest

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
def openvino(
    ckpt: StudentFirst = None,
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
    from ..export_openvino import OpenvinoRequest, run
    from ..method_options import MethodRequest

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
def coreml(
    ckpt: ConvertedStudent = None,
    bundle: ConvertedBundle = None,
    out: ConvertedOut = None,
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
    precision: ComputePrecision = "fp16",
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
    height: Height = None,
    width: Width = None,
    latent_h: Annotated[int | None, typer.Option("--latent-h", help="Height / 8.")] = None,
    latent_w: Annotated[int | None, typer.Option("--latent-w", help="Width / 8.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="K \\[default: as recorded], or the loop's steps.")
    ] = None,
    method: Method = "tiue",
    scheduler: SchedulerName = None,
    key_steps: KeySteps = None,
    inject: Inject = None,
    guidance: Guidance = None,
    budget: Budget = None,
    lora: Lora = None,
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

    Example:  tiue-export coreml --ckpt sd21-base/ --method faster --steps 50 --out fox
    """
    from ..export_coreml import CoremlRequest, run
    from ..method_options import MethodRequest

    run(
        CoremlRequest(
            ckpt=ckpt,
            bundle=bundle,
            out=out,
            base=base,
            vae=vae,
            steps=steps,
            method=MethodRequest(
                method=method,
                scheduler=scheduler,
                key_steps=key_steps,
                inject=inject,
                guidance=guidance,
                budget=budget,
                lora=tuple(lora or ()),
            ),
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
def coreai(
    ckpt: ConvertedStudent = None,
    bundle: ConvertedBundle = None,
    out: ConvertedOut = None,
    base: Base = None,
    vae: Vae = None,
    precision: ComputePrecision = "fp16",
    height: Height = None,
    width: Width = None,
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
    from ..export_coreai import CoreaiRequest, run

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
def trt(
    ckpt: StudentFirst = None,
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
    allow_parity_loss: Annotated[
        bool,
        typer.Option("--allow-parity-loss", help="With --ckpt: keep graphs that fail a gate."),
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

    Example:  tiue-export trt --ckpt sd21-base/ --method faster --max-decoder-rows 10 --out fox

    Example:  tiue-export trt --bundle fox --refit-from tuned.safetensors --out tuned
    """
    from ..export_trt import TrtRequest, run
    from ..method_options import MethodRequest

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
            optimization_level=optimization_level,
            workspace_mb=workspace_mb,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            refit=refit,
            refit_from=refit_from,
            rebuild=rebuild,
            allow_parity_loss=allow_parity_loss,
            dry_run=dry_run,
            force=force,
            as_json=as_json,
        )
    )
