"""Commands on the way to INT8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import (
    BundleArgument,
    Device,
    Force,
    Json,
    LowMemory,
    RuntimeName,
    RuntimePrecision,
    Threads,
)

app = typer.Typer()


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
    from ..calibrate import CalibrateRequest, run

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
        str | None,
        typer.Option(
            "--kind",
            help="w8a8, hybrid (linear layers: weights only), int8-weights, 4-bit "
            "\\[default: w8a8].",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option("--backend", help="onnx: Q/DQ for ort, trt, openvino; openvino: by NNCF."),
    ] = "onnx",
    target_psnr: Annotated[
        float | None,
        typer.Option("--target-psnr", help="dB that the latents shall keep \\[default: 35]."),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option("--ranges", help="min-max, percentile or entropy \\[default: percentile]."),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="In percent \\[default: 99.99].")
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option("--smooth", help="SmoothQuant's alpha, folded exactly \\[default: 0.5]."),
    ] = None,
    no_smooth: Annotated[bool, typer.Option("--no-smooth", help="Fold nothing.")] = False,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            "--sensitivity",
            help="Quantize alone: each layer, each block, or none \\[default: layer].",
        ),
    ] = None,
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
        Path | None,
        typer.Option("--plots", help="Folder for two pictures; measures six sets more."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize the UNet where it is proven: close enough, and faster on this machine.

    Example:  tiue-export quantize fox --calibration fox-calibration --out fox-int8

    Example:  tiue-export quantize fox --calibration fox-calibration --backend openvino

    Example:  tiue-export quantize half --calibration fox-calibration --plan plan.json --any-speed
    """
    from ..quantize import QuantizeRequest, run

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
