"""From jobs to files in memory, on a pipeline that a worker opens once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiue_export.drawing.picture import png_bytes
from tiue_export.drawing.pipeline import Picture, Pipeline
from tiue_export.specs import RuntimeOptions

from .plan import TableJob


@dataclass(frozen=True)
class PipelineSource:
    """What to open; it travels to other processes and machines."""

    bundle: Path
    runtime: str
    options: RuntimeOptions

    def open(self) -> Pipeline:
        """Open it; every hash is checked again where it is opened."""
        return Pipeline.open(self.bundle, self.runtime, self.options)


@dataclass(frozen=True)
class Sample:
    """One picture's files: the PNG, its prompt, and what it was made with as JSON."""

    key: str
    png: bytes
    text: str
    record: str


def draw_jobs(pipeline: Pipeline, jobs: Sequence[TableJob]) -> list[Sample]:
    """Draw and encode; equal jobs give equal bytes."""
    result = pipeline.draw([each.job for each in jobs])
    return [_sample(job, picture) for job, picture in zip(jobs, result.pictures, strict=True)]


def _sample(job: TableJob, picture: Picture) -> Sample:
    parameters = dict(picture.parameters)
    if job.columns:
        # Parquet holds dates and bytes, which JSON does not.
        plain = json.loads(json.dumps(dict(job.columns), default=str))
        parameters["columns"] = plain
    record = json.dumps({"key": job.key, **parameters}, ensure_ascii=False)
    return Sample(job.key, png_bytes(picture.image, parameters), job.job.prompt, record)
