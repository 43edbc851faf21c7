"""Draw a fixed set of prompts with every contender, and score what was drawn.

Everything is measured against drawings that no generator saw, in the feature space of a small
network trained on such drawings: the data lie in the package (demo/quality) or in --data. The
numbers compare contenders with one another and with real pictures of the same prompts, which are
the table's first column; they are no published FID values, which use Inception's features.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from tiue_export.errors import UsageError
from tiue_export.proof.gates import psnr_db
from tiue_export.registry.packages import require
from tiue_export.specs import Array
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors

from .metrics import (
    diversity,
    frechet_distance,
    ground_share,
    kernel_distance,
    manifold_scores,
    mean_cosine,
    retrieval_share,
    row_shares,
)
from .yardstick import Prompt, QualityData

REAL = "real pictures"
NEEDS = ("torch", "torchmetrics", "prdc")
_SAVE_EVERY_S = 20.0
# A prompt's pictures keep their seeds whatever else is asked for.
_SEEDS_PER_PROMPT = 1000


@dataclass(frozen=True)
class Draws:
    """What a contender drew, in the order it was asked.

    `pictures` (N, 128, 128, 3) uint8; `latents` (N, 4, H, W) float32; `row_norms` (N, K) the norms
    |E_k| * ||output_k|| of the decoder rows where the contender has such rows and shows them;
    `seconds` (runs,) what each run took for a picture, text encoder to pixels.
    """

    pictures: Array
    latents: Array
    row_norms: Array | None = None
    seconds: Array | None = None


@dataclass(frozen=True)
class Contender:
    """Something that draws. `draw(prompts, seeds)` takes two lists of equal length, at most `batch`
    long; seed s means the noise of `noise_from_seed(s, ...)`. `identity` tells kept draws of other
    weights or settings from these. In the picture contenders of one `series` share a colour, those
    of one `mark` a shape, and `steps` is the place on the axis where that is not time.
    """

    name: str
    draw: Callable[[Sequence[str], Sequence[int]], Draws]
    identity: str
    batch: int = 8
    series: str = ""
    mark: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class Request:
    """The fixed set: `prompts` with their index in the data, each drawn with `seeds` seeds."""

    prompts: tuple[tuple[int, Prompt], ...]
    seeds: int

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of every picture: prompt by prompt, seed by seed."""
        return [
            (prompt.text, index * _SEEDS_PER_PROMPT + seed)
            for index, prompt in self.prompts
            for seed in range(self.seeds)
        ]


@dataclass(frozen=True)
class Scores:
    """One column of the table; None where a measure does not apply. Shares are in [0, 1]."""

    name: str
    pictures: int
    top1: float
    top5: float
    frechet: float
    kernel: float
    kernel_deviation: float
    precision: float
    recall: float
    density: float
    coverage: float
    ground: float | None = None
    alignment: float | None = None
    feature_diversity: float | None = None
    pixel_diversity: float | None = None
    latents_psnr_db: float | None = None
    row_shares: tuple[float, ...] | None = None
    picture_ms: float | None = None


def choose_prompts(data: QualityData, count: int, seeds: int = 1) -> Request:
    """The first `count` prompts of one fixed shuffle: a smaller set is part of a larger one."""
    if not 1 <= count <= len(data.prompts):
        raise UsageError(f"--prompts is {count}; expected 1 to {len(data.prompts)}")
    if not 1 <= seeds <= _SEEDS_PER_PROMPT:
        raise UsageError(f"--seeds is {seeds}; expected 1 to {_SEEDS_PER_PROMPT}")
    order = np.random.RandomState(0).permutation(len(data.prompts))[:count]
    return Request(tuple((int(index), data.prompts[index]) for index in order), seeds)


def score(
    name: str,
    draws: Draws,
    request: Request,
    data: QualityData,
    reference_latents: Array | None = None,
) -> Scores:
    """All measures of one contender's draws of the whole request."""
    named = [prompt.ground for _, prompt in request.prompts for _ in range(request.seeds)]
    groups = (len(request.prompts), request.seeds)
    pixels = draws.pictures.reshape(*groups, -1).astype(np.float32) / 255
    return replace(
        _score_features(name, data.network.features_of(draws.pictures), request, data),
        ground=ground_share(draws.pictures, named, data.grounds),
        pixel_diversity=diversity(pixels),
        latents_psnr_db=None
        if reference_latents is None
        else psnr_db(reference_latents, draws.latents),
        row_shares=None if draws.row_norms is None else row_shares(draws.row_norms),
        picture_ms=None if draws.seconds is None else 1e3 * float(np.median(draws.seconds)),
    )


def mistaken(draws: Draws, request: Request, data: QualityData) -> dict[str, dict[str, int]]:
    """What each name was taken for, and how often, where its own prototype was not the nearest.

    Names with most mistakes come first; names without are left out.
    """
    shown = np.repeat([prompt.name for _, prompt in request.prompts], request.seeds)
    embeddings = data.network.embeddings_of(data.network.features_of(draws.pictures))
    nearest = (embeddings @ data.prototypes.T).argmax(1)
    found: dict[str, Counter[str]] = {}
    for own, taken in zip(shown, nearest, strict=True):
        if own != taken:
            found.setdefault(data.names[own], Counter())[data.names[taken]] += 1
    ordered = sorted(found.items(), key=lambda entry: -entry[1].total())
    return {name: dict(counts.most_common()) for name, counts in ordered}


def score_real(request: Request, data: QualityData) -> Scores:
    """The same measures on real drawings of the same prompts: what a perfect contender scores."""
    seeds = min(request.seeds, len(data.real))
    rows = [index for index, _ in request.prompts]
    features = data.real[:seeds, rows].transpose(1, 0, 2).reshape(-1, data.real.shape[2])
    return _score_features(REAL, features, Request(request.prompts, seeds), data)


def _score_features(name: str, features: Array, request: Request, data: QualityData) -> Scores:
    """What can be told from features (N, D) alone."""
    shown = np.repeat([prompt.name for _, prompt in request.prompts], request.seeds)
    reference = data.reference_of(shown)
    embeddings = data.network.embeddings_of(features)
    kernel, deviation = kernel_distance(reference, features)
    alignment = None
    if data.alignment is not None:
        texts = np.repeat([index for index, _ in request.prompts], request.seeds)
        alignment = mean_cosine(data.alignment.text[texts], data.alignment.pictures(features))
    return Scores(
        name=name,
        pictures=len(features),
        top1=retrieval_share(embeddings, data.prototypes, shown, 1),
        top5=retrieval_share(embeddings, data.prototypes, shown, 5),
        alignment=alignment,
        frechet=frechet_distance(reference, features),
        kernel=kernel,
        kernel_deviation=deviation,
        **asdict(manifold_scores(reference, features)),
        feature_diversity=diversity(features.reshape(-1, request.seeds, features.shape[1])),
    )


def compare(
    contenders: Sequence[Contender],
    request: Request,
    data: QualityData,
    *,
    keep: Path | None = None,
    on_draws: Callable[[str, Draws], None] = lambda name, draws: None,
) -> list[Scores]:
    """Draw with each contender and score it; real pictures come first in the result.

    Latents are held against the first contender's. `keep` is a folder for draws: a broken
    comparison goes on with the pictures it broke at. `on_draws` gets each contender's draws.
    """
    require("measuring quality", NEEDS, "bench")
    scores = [score_real(request, data)]
    reference: Array | None = None
    for contender in contenders:
        draws = draw_all(contender, request, keep)
        on_draws(contender.name, draws)
        scores.append(score(contender.name, draws, request, data, reference))
        reference = draws.latents if reference is None else reference
    return scores


def draw_all(contender: Contender, request: Request, keep: Path | None) -> Draws:
    """All pictures of the request, chunk by chunk; taken from `keep` where it holds them."""
    file = None if keep is None else _kept_file(keep, contender, request)
    if file is not None and file.is_file():
        return _read_draws(file)
    unfinished = None if file is None else file.with_suffix(".unfinished.npz")
    jobs, name, console = request.jobs, escape(contender.name), Console(stderr=True)
    parts: list[Draws] = []
    if unfinished is not None and unfinished.is_file():
        parts.append(_read_draws(unfinished))
    done = sum(len(part.pictures) for part in parts)
    began = saved = time.perf_counter()
    starts, hidden = range(done, len(jobs), contender.batch), not console.is_terminal
    for start in track(starts, name, console=console, transient=True, disable=hidden):
        chunk = jobs[start : start + contender.batch]
        chunk_began = time.perf_counter()
        part = contender.draw([text for text, _ in chunk], [seed for _, seed in chunk])
        now = time.perf_counter()
        parts.append(replace(part, seconds=np.array([(now - chunk_began) / len(chunk)])))
        if unfinished is not None and now - saved > _SAVE_EVERY_S:
            parts, saved = [_joined(parts)], now
            _write_draws(unfinished, parts[0])
    drawn, took = len(jobs) - done, time.perf_counter() - began
    console.print(f"{name}: {drawn} pictures in {took:.0f} s{f', {done} kept' if done else ''}")
    draws = _joined(parts)
    if file is not None:
        _write_draws(file, draws)
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return draws


def _kept_file(keep: Path, contender: Contender, request: Request) -> Path:
    digest = hashlib.sha256(json.dumps([contender.identity, request.jobs]).encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9]+", "-", contender.name.lower()).strip("-")
    return keep / f"{slug[:40]}-{digest[:12]}.npz"


def _write_draws(file: Path, draws: Draws) -> None:
    arrays = {name: array for name, array in vars(draws).items() if array is not None}
    content = io.BytesIO()
    np.savez(content, **arrays)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content.getvalue())


def _read_draws(file: Path) -> Draws:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return Draws(**dict(arrays))
    except Exception as error:  # numpy raises BadZipFile, TokenError and more on damaged files
        raise UsageError(f"{file} holds no draws: {error}", f"Remove {file}.") from error


def _joined(parts: Sequence[Draws]) -> Draws:
    """One after the other; what the first lacks, all lack."""
    every = [vars(part) for part in parts]
    names = [name for name, array in every[0].items() if array is not None]
    return Draws(**{name: np.concatenate([arrays[name] for arrays in every]) for name in names})
