"""When `tiue-export generate` draws in bulk, and which of its options have no meaning there."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from tiue_export.errors import UsageError
from tiue_export.specs import RuntimeOptions

from ..generate import GenerateRequest
from .drawing_run import BulkRequest
from .prompt_table import TABLES


@dataclass(frozen=True)
class BulkOptions:
    """The options that only a bulk run has; None where not given."""

    file_format: str | None = None
    shard_pictures: int | None = None
    workers: int | None = None
    prompt_column: str | None = None
    ray: bool = False


def in_bulk(request: GenerateRequest, options: BulkOptions) -> bool:
    """Whether the prompts are a table, or an option of bulk runs was given."""
    path = request.prompts_file
    table = path is not None and path.suffix.lower() in TABLES
    return table or options != BulkOptions()


def bulk_request(request: GenerateRequest, options: BulkOptions) -> BulkRequest:
    """The bulk run that was asked for; options that it would not honour are refused."""
    if request.prompts_file is None:
        raise UsageError(
            "--format, --shard-size, --workers, --prompt-column and --ray draw a file of prompts",
            "Add --prompts prompts.tsv (or .jsonl, .parquet, .txt).",
        )
    refused = {
        "prompts on the command line": bool(request.prompts),
        "--sheet": request.sheet is not None,
        "--latents": request.latents is not None,
        "--time": request.time_stages,
        "--steps": request.plan_change.steps is not None,
        "--key-steps": request.plan_change.key_steps is not None,
        "--inject": request.plan_change.inject is not None,
        "--max-decoder-rows": request.plan_change.max_decoder_rows is not None,
        "--control": request.control is not None,
        "--control-scale": request.control_scale is not None,
        "--force": request.force,
    }
    given = [name for name, value in refused.items() if value]
    if given:
        raise UsageError(
            f"drawing {request.prompts_file} in bulk takes no {' and no '.join(given)}",
            "Bulk runs go on where they stopped; choose another --out to begin anew."
            if given == ["--force"]
            else "Leave it out.",
        )
    if request.out.suffix.lower() in (".png", ".tar"):
        raise UsageError(f"--out {request.out} is one file", "Give --out a folder.")
    if options.shard_pictures is not None and options.file_format != "tar":
        raise UsageError("--shard-size is for --format tar", "Add --format tar, or leave it out.")
    given_options = {
        name: value
        for name, value in zip(BulkOptions.__dataclass_fields__, astuple(options), strict=True)
        if value is not None
    }
    return BulkRequest(
        bundle=request.bundle,
        prompts_file=request.prompts_file,
        out=request.out,
        count=request.count,
        seed=request.seed or 0,
        negative_prompt=request.negative_prompt,
        guidance=request.guidance,
        runtime=request.runtime,
        options=RuntimeOptions(
            device=request.device,
            threads=request.threads,
            low_memory=request.low_memory,
            precision=request.precision,
            checkpoint=request.ckpt,
            base=request.base,
            vae=request.vae,
            provider=request.provider,
            cuda_graph=request.cuda_graph,
        ),
        as_json=request.as_json,
        **given_options,
    )
