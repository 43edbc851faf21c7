"""Two ways to draw the same picture, held against each other: pixels, PSNR, time of each stage."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db, weakest
from tiue_export.specs import Array

from .choices import Choice
from .drawing import Drawer, Drawn

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Comparison:
    """Left is the reference. PSNR in dB with peak = max|left|, `max_levels` of 255.

    `gate_db` is None when the two do not come from the same weights and noise.
    `latency_ms` holds for each side its stages' times, run by run.
    """

    left: Drawn
    right: Drawn
    latents_psnr_db: float
    picture_psnr_db: float
    max_levels: int
    gate_db: float | None
    amplification: int
    difference: Image
    latency_ms: tuple[Mapping[str, list[float]], Mapping[str, list[float]]] = field(
        default_factory=lambda: ({}, {})
    )


def compare(
    drawer: Drawer, left: Choice, right: Choice, prompt: str, seed: int, runs: int
) -> Iterator[Comparison]:
    """The comparison as soon as both are drawn, then again after each timed run of both in turn."""
    if left.label == right.label:
        raise UsageError(f"both sides are {left.label!r}", "Choose two different ones.")
    if left.size != right.size:
        raise UsageError(f"the sizes differ: {left.size} and {right.size}", "Choose one size.")
    drawn = [next(drawer.draw(choice, prompt, seed)) for choice in (left, right)]
    pixels = [_pixels(picture.path) for picture in drawn]
    map_image, amplification = difference_map(*pixels)
    same = left.bundle.manifest.source.sha256 == right.bundle.manifest.source.sha256
    found = Comparison(
        drawn[0],
        drawn[1],
        psnr_db(drawn[0].latents, drawn[1].latents),
        psnr_db(pixels[0], pixels[1]),
        int(np.abs(pixels[0].astype(np.int16) - pixels[1]).max()),
        GATES_PSNR_DB[weakest(left.precision, right.precision)] if same else None,
        amplification,
        map_image,
    )
    yield found
    times: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    for _ in range(runs):
        for side, choice in enumerate((left, right)):
            for stage, latency_ms in drawer.measure(choice, prompt, seed).items():
                times[side].setdefault(stage, []).append(latency_ms)
        yield replace(found, latency_ms=times)


def medians(latency_ms: Mapping[str, list[float]]) -> dict[str, float]:
    """The median time of each stage."""
    return {stage: statistics.median(times) for stage, times in latency_ms.items()}


def difference_map(left: Array, right: Array) -> tuple[Image, int]:
    """|left - right| of two uint8 (H, W, 3), largest channel, in grey; and how much amplified.

    The factor is a power of two that brings the largest difference near white.
    """
    from PIL import Image

    difference = np.abs(left.astype(np.int16) - right.astype(np.int16)).max(axis=2)  # (H, W)
    largest = int(difference.max())
    factor = 1
    while largest and largest * factor * 2 <= 255:
        factor *= 2
    return Image.fromarray((difference * factor).astype(np.uint8)), factor


def _pixels(path: Path) -> Array:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
