"""`tiue-export generate --prompts TABLE`: plan, find what is there, draw the rest, check it all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tiue_export.bundle.folder import disk_errors, open_bundle
from tiue_export.drawing.pipeline import check_steering
from tiue_export.errors import UsageError, unknown_name
from tiue_export.sampling.plan import check_guidance
from tiue_export.specs import RuntimeOptions

from ...report.tables import console, print_json
from .drawing import PipelineSource, Sample
from .plan import BulkPlan, Chunk, chunk_pictures, plan_jobs, run_identity
from .png_folder import PngFolder
from .progress import Pace, duration, shown
from .prompt_table import read_rows
from .tar_shards import TarShards
from .worker_pool import draw_here, draw_in_processes
from .writer import PictureWriter

_WRITERS: Mapping[str, Callable[[Path, BulkPlan], PictureWriter]] = {
    "png": PngFolder,
    "tar": TarShards,
}
_RECORD = "bulk.json"
_LOCK = ".lock"
_DIFFERENCES = {
    "jobs_sha256": "other prompts, ids, seeds, guidance or shard sizes",
    "bundle_sha256": "another bundle",
}


@dataclass(frozen=True)
class BulkRequest:
    """The options of a bulk run; `file_format` is png or tar."""

    bundle: Path
    prompts_file: Path
    out: Path
    prompt_column: str = "prompt"
    count: int = 1
    seed: int = 0
    negative_prompt: str | None = None
    guidance: float | None = None
    file_format: str = "png"
    shard_pictures: int = 1000
    workers: int = 1
    ray: bool = False
    runtime: str = "ort"
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    as_json: bool = False


def run(request: BulkRequest) -> None:
    """Draw every picture of the table that is not there yet."""
    _check(request)
    rows = read_rows(request.prompts_file, request.prompt_column)
    bundle = open_bundle(request.bundle)
    if request.guidance is not None or request.negative_prompt is not None:
        check_steering(bundle, request.guidance is not None)
    if request.guidance is not None:
        check_guidance(request.guidance)
    negative = request.negative_prompt or ""
    jobs = plan_jobs(rows, request.count, request.seed, negative, request.guidance)
    plan = BulkPlan(jobs, chunk_pictures(bundle), request.shard_pictures)
    options = request.options
    runtime = {
        "runtime": request.runtime,
        "device": options.device,
        "precision": options.precision,
        "provider": options.provider,
    }
    identity = run_identity(plan, bundle, request.file_format, runtime)
    source = PipelineSource(request.bundle.resolve(), request.runtime, options)
    with disk_errors(request.out / _RECORD), _owned(request.out, identity):
        writer = _WRITERS[request.file_format](request.out, plan)
        written = writer.written()
        missing = [chunk for chunk in plan.chunks() if chunk.index not in written]
        pace = Pace(len(jobs), len(jobs) - sum(len(chunk.jobs) for chunk in missing))
        if pace.found and not request.as_json:
            Console(stderr=True).print(
                f"going on: {pace.found} of {pace.total} pictures are there", highlight=False
            )
        try:
            with shown(pace, quiet=request.as_json) as tell:
                for chunk, samples in _drawn(request, source, missing):
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
    _report(request, pace, files)


def _check(request: BulkRequest) -> None:
    if request.file_format not in _WRITERS:
        raise unknown_name("format", request.file_format, _WRITERS)
    for option, value in (("--workers", request.workers), ("--shard-size", request.shard_pictures)):
        if value < 1:
            raise UsageError(f"{option} is {value}; expected 1 or more")


def _drawn(
    request: BulkRequest, source: PipelineSource, chunks: Sequence[Chunk]
) -> Iterator[tuple[Chunk, list[Sample]]]:
    if not chunks:
        return iter(())
    if request.ray:
        from .ray_pool import draw_on_ray

        return draw_on_ray(source, chunks, request.workers)
    if request.workers == 1:
        return draw_here(source, chunks)
    return draw_in_processes(source, chunks, request.workers)


@contextmanager
def _owned(out: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """The folder, held against a second run, and only if an earlier run in it drew the same."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "Give --out a folder.")
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is drawing into {out}", "Wait for it, or choose another --out."
            ) from error
        _agree(out, identity)
        yield


def _agree(out: Path, identity: Mapping[str, Any]) -> None:
    path = out / _RECORD
    if not path.exists():
        others = [name for name in sorted(os.listdir(out)) if name != _LOCK]
        if others:
            raise UsageError(
                f"{out} holds {others[0]} and is no bulk run's folder", "Choose another --out."
            )
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(identity, indent=1) + "\n", "utf-8")
        partial.replace(path)
        return
    try:
        before = json.loads(path.read_text("utf-8"))
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


def _report(request: BulkRequest, pace: Pace, files: Sequence[Path]) -> None:
    if request.as_json:
        print_json(
            {
                "out": str(request.out),
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
        f"{pace.total} pictures in {request.out}, none missing, none twice: {pace.drawn} drawn in "
        f"{duration(pace.elapsed_s)} ({pace.pictures_per_s:.2f} images/s), {pace.found} found",
        markup=False,
        highlight=False,
    )
    for path in files:
        console.print(str(path), markup=False, highlight=False)
