"""Ordinary models for tests, loaded with a plan of Faster Diffusion."""

from __future__ import annotations

from pathlib import Path

from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.student.model import Student


def load_teacher(path: str | Path, *, options: FasterOptions | None = None) -> Student:
    """A checkpoint of Stable Diffusion 1.x/2.x with the plan of these options."""
    chosen = options or FasterOptions()
    given = SamplingOptions(
        steps=chosen.steps,
        scheduler=chosen.scheduler,
        key_steps=chosen.key_steps,
        inject=chosen.inject,
        guidance=chosen.guidance,
        max_decoder_rows=chosen.max_decoder_rows,
    )
    return load_for_method(CheckpointRequest(str(path)), "faster", given)
