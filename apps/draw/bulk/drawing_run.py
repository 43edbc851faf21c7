"""`tiue-export generate --prompts TABLE`: plan, find what is there, draw the rest, check it all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.drawing.pipeline import check_steering
from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.support import require_support
from tiue_export.sampling.plan import check_guidance
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.json_file import read_object
from tiue_export.system.lock import sole_process
from tiue_export.system.owned_path import is_owned

from ...options.generate import BulkOptions, DrawOptions
from ...options.group import given
from ...report.tables import console, print_json
from ..fastest_runtime import resolved_runtime
from ..prompt_file import PROMPT_COLUMN, TABLES
from .drawing import PipelineSource, Sample
from .plan import BulkPlan, Chunk, TableJob, chunk_pictures, plan_jobs, run_identity
from .png_folder import PngFolder
from .progress import Pace, duration, shown
from .prompt_table import PromptRow, read_rows
from .tar_shards import TarShards
from .worker_pool import draw_here, draw_in_processes

# A kill at any moment leaves whole chunks, or what is redrawn.
_WRITERS: Mapping[str, type[PngFolder | TarShards]] = {"png": PngFolder, "tar": TarShards}
_RECORD = "bulk.json"
_LOCK = ".lock"
_DIFFERENCES = {
    "jobs_sha256": "other prompts, ids, seeds, guidance or shard sizes",
    "bundle_sha256": "another bundle",
}


# What of a request for pictures a bulk run honours.
_USABLE = (
    *("bundle", "prompts_file", "seed", "count", "negative", "guidance", "out", "as_json"),
    "prompt_weights",
    *("runtime", "device", "threads", "precision", "provider", "cuda_graph", "low_memory"),
    *("ckpt", "base", "vae", "lora", "embedding"),
)
_FORMAT = "png"
_SHARD_PICTURES = 1000


def in_bulk(draw: DrawOptions, bulk: BulkOptions) -> bool:
    """Whether the prompts are a table, or an option of bulk runs was given."""
    path = draw.prompts_file
    return bool(given(bulk)) or (path is not None and path.suffix.lower() in TABLES)


def run(draw: DrawOptions, bulk: BulkOptions) -> None:
    """Draw every picture of the table that is not there yet."""
    table, out, quiet = _check(draw, bulk), draw.out, draw.as_json
    rows = read_rows(table, bulk.prompt_column or PROMPT_COLUMN)
    bundle = open_bundle(draw.bundle)
    require_support("bulk", bundle)
    plan = BulkPlan(
        _jobs(draw, bundle, rows), chunk_pictures(bundle), bulk.shard_size or _SHARD_PICTURES
    )
    options = draw.runtime_options(draw)
    name, _ = resolved_runtime(bundle, draw.runtime, options, quiet=quiet)
    file_format = bulk.file_format or _FORMAT
    runtime = {
        "runtime": name,
        "device": options.device,
        "precision": options.precision,
        "provider": options.provider,
    }
    identity = run_identity(plan, bundle, file_format, runtime)
    source = PipelineSource(draw.bundle.resolve(), name, options)
    with disk_errors(out / _RECORD), _owned(out, identity):
        writer = _WRITERS[file_format](out, plan)
        written = writer.written()
        missing = [chunk for chunk in plan.chunks() if chunk.index not in written]
        pace = Pace(len(plan.jobs), len(plan.jobs) - sum(len(chunk.jobs) for chunk in missing))
        if pace.found and not quiet:
            Console(stderr=True).print(
                f"going on: {pace.found} of {pace.total} pictures are there", highlight=False
            )
        try:
            with shown(pace, quiet=quiet) as tell:
                for chunk, samples in _drawn(bulk, source, missing):
                    writer.write(chunk, samples)
                    pace.add(len(samples))
                    tell()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted after {pace.found + pace.drawn} of {pace.total} pictures; "
                "run the same line again to go on"
            ) from None
        finally:
            writer.close()
        files = writer.finish()
    _report(out, pace, files, as_json=quiet)


def _check(draw: DrawOptions, bulk: BulkOptions) -> Path:
    """The file of prompts; options that a bulk run would not honour are refused."""
    table = draw.prompts_file
    if table is None:
        verb = "is" if len(given(bulk)) == 1 else "are"
        raise UsageError(
            f"{', '.join(given(bulk))} {verb} for drawing a file of prompts",
            "Add --prompts prompts.tsv (or .csv, .jsonl, .parquet, .txt).",
        )
    if refused := given(draw, usable=_USABLE):
        raise UsageError(
            f"drawing {table} in bulk takes no {' and no '.join(refused)}",
            "Bulk runs go on where they stopped; choose another --out to begin anew."
            if refused == ("--force",)
            else "Leave it out.",
        )
    if draw.out.suffix.lower() in (".png", ".tar"):
        raise UsageError(f"--out {draw.out} is one file", "Give --out a folder.")
    if bulk.shard_size is not None and bulk.file_format != "tar":
        raise UsageError("--shard-size is for --format tar", "Add --format tar, or leave it out.")
    if bulk.file_format not in (None, *_WRITERS):
        raise unknown_name("format", str(bulk.file_format), _WRITERS)
    for option, value in (("--workers", bulk.workers), ("--shard-size", bulk.shard_size)):
        if value is not None and value < 1:
            raise UsageError(f"{option} is {value}; expected 1 or more")
    return table


def _jobs(draw: DrawOptions, bundle: Bundle, rows: Sequence[PromptRow]) -> tuple[TableJob, ...]:
    if draw.guidance is not None or draw.negative is not None:
        check_steering(bundle, draw.guidance is not None)
    if draw.guidance is not None:
        check_guidance(draw.guidance)
    steering = draw.negative or "", draw.guidance, draw.prompt_weights
    return plan_jobs(rows, draw.count, draw.seed or 0, *steering)


def _drawn(
    bulk: BulkOptions, source: PipelineSource, chunks: Sequence[Chunk]
) -> Iterator[tuple[Chunk, list[Sample]]]:
    workers = bulk.workers or 1
    if not chunks:
        return iter(())
    if bulk.ray:
        from .ray_pool import draw_on_ray

        return draw_on_ray(source, chunks, workers)
    if workers == 1:
        return draw_here(source, chunks)
    return draw_in_processes(source, chunks, workers)


@contextmanager
def _owned(out: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """The folder, held against a second run, and only if an earlier run in it drew the same."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "Give --out a folder.")
    out.mkdir(parents=True, exist_ok=True)
    with sole_process(out / _LOCK, f"drawing into {out}"):
        _agree(out, identity)
        yield


def _agree(out: Path, identity: Mapping[str, Any]) -> None:
    path = out / _RECORD
    if not path.exists():
        listed = [name for name in sorted(os.listdir(out)) if name != _LOCK]
        others = [name for name in listed if not is_owned(name, "partial")]  # of a killed start
        if others:
            raise UsageError(
                f"{out} holds {others[0]} and is no bulk run's folder", "Choose another --out."
            )
        write_atomically(path, (json.dumps(identity, indent=1) + "\n").encode())
        return
    try:
        before = read_object(path)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", "Choose another --out.") from error
    different = [name for name, value in identity.items() if before.get(name) != value]
    if different:
        name = different[0]
        what = _DIFFERENCES.get(name, f"{name} {before.get(name)!r} instead of {identity[name]!r}")
        raise UsageError(
            f"{out} holds a run with {what}"
            + (f", and {len(different) - 1} more differences" if len(different) > 1 else ""),
            "Run the line it was begun with, or choose another --out.",
        )


def _report(out: Path, pace: Pace, files: Sequence[Path], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "out": str(out),
                "pictures": pace.total,
                "found": pace.found,
                "drawn": pace.drawn,
                "seconds": round(pace.elapsed_s, 2),
                "pictures_per_s": round(pace.pictures_per_s, 3),
                "files": [str(path) for path in files],
            }
        )
        return
    console.print(
        f"{pace.total} pictures in {out}, none missing, none twice: {pace.drawn} drawn in "
        f"{duration(pace.elapsed_s)} ({pace.pictures_per_s:.2f} images/s), {pace.found} found",
        markup=False,
        highlight=False,
    )
    for path in files:
        console.print(str(path), markup=False, highlight=False)
