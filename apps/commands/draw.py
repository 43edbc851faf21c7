"""Commands that draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..completion import bundle_folders, runtime_names
from ..report.failures import explained
from .shared_options import (
    Base,
    BundleArgument,
    CudaGraph,
    DecoderRows,
    Device,
    Force,
    Guidance,
    Json,
    LowMemory,
    Provider,
    RuntimeName,
    RuntimeOrAuto,
    RuntimePrecision,
    Threads,
    Vae,
)

app = typer.Typer()


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
    steps: Annotated[
        int | None,
        typer.Option("--steps", help="faster: steps of the sampler \\[default: the bundle's]."),
    ] = None,
    key_steps: Annotated[
        str | None,
        typer.Option(
            "--key-steps",
            help="faster: nonuniform, uniform:N or 0,1,2,...; uniform:1 is ordinary sampling.",
        ),
    ] = None,
    inject: Annotated[
        str | None,
        typer.Option("--inject", help="faster: prior noise: off, on, parallel, sequential."),
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

    Example:  tiue-export generate teacher "a red fox" --steps 25 --key-steps uniform:1 --inject off
    """
    from tiue_export.sampling.plan_options import PlanChange

    from ..draw.bulk.options import BulkOptions, bulk_request, in_bulk
    from ..draw.generate import GenerateRequest, run, with_resolved_runtime

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
        plan_change=PlanChange(steps, key_steps, inject, max_decoder_rows),
        control=control,
        control_scale=control_scale,
        force=force,
        as_json=as_json,
    )
    if in_bulk(request, bulk):
        from ..draw.bulk.drawing_run import run as draw_in_bulk

        request = with_resolved_runtime(request)
        draw_in_bulk(bulk_request(request, bulk))
    else:
        run(request)


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
    from ..studio.serving import StudioRequest, run

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

    from ..server.serving import ServeRequest, run
    from ..server.settings import ServerLimits

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
