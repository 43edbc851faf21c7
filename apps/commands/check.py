"""Commands that show, prove and time a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.failures import explained
from .shared_options import (
    Base,
    BundleArgument,
    CudaGraph,
    Device,
    Json,
    LowMemory,
    Provider,
    RuntimeName,
    RuntimePrecision,
    Threads,
    Vae,
)

app = typer.Typer()


@app.command()
@explained
def inspect(bundle: BundleArgument, as_json: Json = False) -> None:
    """Show what a bundle holds: graphs, constants, parity, origin. Verifies every file.

    Example:  tiue-export inspect fox
    """
    from ..inspection import run

    run(bundle, as_json)


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

    from ..parity_check import run

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
    from ..bench import BenchRequest, run

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
