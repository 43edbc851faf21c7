"""What is drawn in which order, fixed before anything is drawn: it makes a run repeatable.

Pictures that share a run may differ in their last bit from pictures drawn alone, so who shares a
run with whom must not depend on the number of workers, nor on where an earlier run was killed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiue_export._version import __version__
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.pipeline import DYNAMIC_BATCH, Job
from tiue_export.drawing.prompt_weights import parse_weights
from tiue_export.errors import UsageError
from tiue_export.registry.backends import BACKENDS
from tiue_export.sampling.noise import MAX_SEED, check_picture_count

from .prompt_table import PromptRow

# Few enough that a kill costs little, enough that handing them around costs nothing.
_CHUNK_PICTURES = 8


@dataclass(frozen=True)
class TableJob:
    """One picture of a table: its file's stem, what to draw, and the table's other columns."""

    key: str
    job: Job
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Jobs drawn by one worker in one go; chunks of a shard follow each other."""

    index: int
    shard: int
    jobs: tuple[TableJob, ...]


@dataclass(frozen=True)
class BulkPlan:
    """All jobs in order, and how they are cut: into shards, those into chunks."""

    jobs: tuple[TableJob, ...]
    chunk_pictures: int
    shard_pictures: int

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk in order; none reaches over a shard's end."""
        index = 0
        for shard, jobs in enumerate(self.shards()):
            for start in range(0, len(jobs), self.chunk_pictures):
                yield Chunk(index, shard, jobs[start : start + self.chunk_pictures])
                index += 1

    def shards(self) -> list[tuple[TableJob, ...]]:
        """The jobs of each shard."""
        size = self.shard_pictures
        return [self.jobs[start : start + size] for start in range(0, len(self.jobs), size)]

    def sha256(self) -> str:
        """Over everything that decides what is drawn and where it lies."""
        digest = hashlib.sha256(f"{self.chunk_pictures} {self.shard_pictures}\n".encode())
        for each in self.jobs:
            job = each.job
            record = [each.key, job.prompt, job.seed, each.columns, job.negative, job.guidance]
            record += ["weighted"] if job.weighted else []
            digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def plan_jobs(
    rows: Sequence[PromptRow],
    count: int,
    seed: int,
    negative: str = "",
    guidance: float | None = None,
    weighted: bool = False,
) -> tuple[TableJob, ...]:
    """`count` pictures a row. A row's own seed counts on from itself, else picture i of all from
    `seed` + i: no two rows start from the same noise, which would tie an evaluation's pictures.
    """
    if count < 1:
        raise UsageError(f"--count is {count}; expected 1 or more")
    check_picture_count(len(rows) * count)
    jobs = []
    for number, row in enumerate(rows):
        if weighted:
            parse_weights(row.prompt)
        first = seed + number * count if row.seed is None else row.seed
        if not 0 <= first <= MAX_SEED - (count - 1):
            raise UsageError(
                f"row {number + 1} would need seed {first}; expected 0 to {MAX_SEED - count + 1}"
            )
        for i in range(count):
            key = row.key if count == 1 else f"{row.key}-{i}"
            job = Job(row.prompt, first + i, negative, guidance, weighted)
            jobs.append(TableJob(key, job, row.columns))
    seen: set[str] = set()
    for each in jobs:
        # Some file systems take A.png and a.png for one file.
        if each.key.lower() in seen:
            raise UsageError(f"two pictures would be named {each.key!r}", "Change the ids.")
        seen.add(each.key.lower())
    return tuple(jobs)


def chunk_pictures(bundle: Bundle) -> int:
    """A whole number of the bundle's runs."""
    batch = bundle.manifest.batch or DYNAMIC_BATCH
    return batch * math.ceil(_CHUNK_PICTURES / batch)


def bundle_sha256(bundle: Bundle, runtime: str) -> str:
    """Over the hashes of everything in the bundle that the runtime draws with."""
    manifest = bundle.manifest
    records = {name: record.sha256 for name, record in manifest.files.items()}
    for graph in manifest.graphs.values():
        records.update({name: record.sha256 for name, record in graph.files.items()})
    reads_forms = bool(BACKENDS[runtime].folders)
    for compiled in manifest.compiled.values() if reads_forms else ():
        for form in compiled.graphs.values():
            records.update({name: record.sha256 for name, record in form.files.items()})
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def run_identity(
    plan: BulkPlan, bundle: Bundle, file_format: str, runtime: Mapping[str, Any]
) -> dict[str, Any]:
    """What an earlier run in the same folder must agree in, to be gone on with."""
    return {
        "pictures": len(plan.jobs),
        "format": file_format,
        "jobs_sha256": plan.sha256(),
        "bundle_sha256": bundle_sha256(bundle, runtime["runtime"]),
        **runtime,
        "version": f"tiue-export {__version__}",
    }
