"""How good are the pictures of a bundle? Draw a fixed set of prompts, and measure.

    python -m tiue_export.benchmarks.quality.judge --bundle fp32/ --bundle int8/ --json quality.json

Everything is measured against drawings that no generator saw, in the feature space of a small
network trained on such drawings: the data lie in the package (demo/quality) or in --data. The
numbers compare contenders with one another and with real pictures of the same prompts, which are
the table's first column; they are no published FID values, which use Inception's features.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tiue_export.bundle.folder import Bundle, disk_errors, open_bundle
from tiue_export.drawing.contact_sheet import contact_sheet
from tiue_export.drawing.picture import image_from_pixels, pixels_from_sample, save_png
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.proof.gates import IDENTICAL_DB, psnr_db
from tiue_export.registry.packages import require
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import Array, RuntimeOptions
from tiue_export.system.atomic_file import write_atomically

from ..explained import run_explained
from ..figure import check_file
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
from .yardstick import PICTURE_SIZE_PX, Prompt, QualityData, load_quality_data

if TYPE_CHECKING:
    from PIL.Image import Image

REAL = "real pictures"
NEEDS = ("torch", "torchmetrics", "prdc")
# A prompt's pictures keep their seeds whatever else is asked for.
_SEEDS_PER_PROMPT = 1000
_DYNAMIC_BATCH = 8
_SHEET_ROWS = 12


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
    weights or settings from these.
    """

    name: str
    draw: Callable[[Sequence[str], Sequence[int]], Draws]
    identity: str
    batch: int = 8


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
    ground: float | None
    alignment: float | None
    frechet: float
    kernel: float
    kernel_deviation: float
    precision: float
    recall: float
    density: float
    coverage: float
    feature_diversity: float | None
    pixel_diversity: float | None
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
    features = data.network.features_of(draws.pictures)
    groups = (len(request.prompts), request.seeds)
    named = [prompt.ground for _, prompt in request.prompts for _ in range(request.seeds)]
    pixels = draws.pictures.reshape(*groups, -1).astype(np.float32) / 255
    return _score_features(
        name,
        features,
        request,
        data,
        ground=ground_share(draws.pictures, named, data.grounds),
        pixel_diversity=diversity(pixels),
        latents_psnr_db=None
        if reference_latents is None
        else psnr_db(reference_latents, draws.latents),
        row_shares=None if draws.row_norms is None else row_shares(draws.row_norms),
        picture_ms=None if draws.seconds is None else 1e3 * float(np.median(draws.seconds)),
    )


def score_real(request: Request, data: QualityData) -> Scores:
    """The same measures on real drawings of the same prompts: what a perfect contender scores."""
    seeds = min(request.seeds, len(data.real))
    rows = [index for index, _ in request.prompts]
    features = data.real[:seeds, rows].transpose(1, 0, 2).reshape(-1, data.real.shape[2])
    return _score_features(REAL, features, Request(request.prompts, seeds), data)


def _score_features(
    name: str,
    features: Array,
    request: Request,
    data: QualityData,
    *,
    ground: float | None = None,
    pixel_diversity: float | None = None,
    latents_psnr_db: float | None = None,
    row_shares: tuple[float, ...] | None = None,
    picture_ms: float | None = None,
) -> Scores:
    """What can be told from features (N, D) alone, and what was found out before."""
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
        ground=ground,
        alignment=alignment,
        frechet=frechet_distance(reference, features),
        kernel=kernel,
        kernel_deviation=deviation,
        **asdict(manifold_scores(reference, features)),
        feature_diversity=diversity(features.reshape(-1, request.seeds, features.shape[1])),
        pixel_diversity=pixel_diversity,
        latents_psnr_db=latents_psnr_db,
        row_shares=row_shares,
        picture_ms=picture_ms,
    )


def compare(
    contenders: Sequence[Contender],
    request: Request,
    data: QualityData,
    *,
    keep: Path | None = None,
    console: Console | None = None,
    on_draws: Callable[[str, Draws], None] = lambda name, draws: None,
) -> list[Scores]:
    """Draw with each contender and score it; real pictures come first in the result.

    Latents are held against the first contender's. `keep` is a folder for finished draws: a broken
    comparison goes on with the contender it broke at. `on_draws` gets each contender's draws.
    """
    require("measuring quality", NEEDS, "bench")
    scores = [score_real(request, data)]
    reference: Array | None = None
    for contender in contenders:
        draws = draw_all(contender, request, keep, console or Console(stderr=True))
        on_draws(contender.name, draws)
        scores.append(score(contender.name, draws, request, data, reference))
        reference = draws.latents if reference is None else reference
    return scores


def draw_all(contender: Contender, request: Request, keep: Path | None, console: Console) -> Draws:
    """All pictures of the request, chunk by chunk; taken from `keep` where it holds them."""
    file = None if keep is None else _kept_file(keep, contender, request)
    if file is not None and file.is_file():
        return _read_draws(file)
    jobs = request.jobs
    parts, seconds = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    began = time.perf_counter()
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(escape(contender.name), total=len(jobs))
        for start in range(0, len(jobs), contender.batch):
            chunk = jobs[start : start + contender.batch]
            chunk_began = time.perf_counter()
            parts.append(contender.draw([text for text, _ in chunk], [seed for _, seed in chunk]))
            seconds.append((time.perf_counter() - chunk_began) / len(chunk))
            progress.advance(task, len(chunk))
    took = time.perf_counter() - began
    console.print(f"{escape(contender.name)}: {len(jobs)} pictures in {took:.0f} s")
    draws = Draws(
        np.concatenate([part.pictures for part in parts]),
        np.concatenate([part.latents for part in parts]),
        _joined([part.row_norms for part in parts]),
        np.array(seconds),
    )
    if file is not None:
        _write_draws(file, draws)
    return draws


def bundle_contender(
    path: Path, data: QualityData, runtime: str = "ort", options: RuntimeOptions | None = None
) -> Contender:
    """A bundle on a runtime. Raises `UsageError` when it is not of the data's family."""
    bundle = open_bundle(path)
    require_family(bundle, data)
    return pipeline_contender(path.name, Pipeline.open(bundle, runtime, options))


def pipeline_contender(name: str, pipeline: Pipeline) -> Contender:
    """An opened bundle; one with a plan is drawn with the plan's guidance."""
    bundle = pipeline.bundle
    shape = tuple(int(side) for side in bundle.manifest.latent_shape[1:])
    size = bundle.manifest.batch or _DYNAMIC_BATCH

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Draws:
        count = len(prompts)
        missing = size - count if bundle.manifest.batch else 0
        filled = [*prompts, *[prompts[-1]] * missing]
        noise = [noise_from_seed(seed, (1, *shape)) for seed in [*seeds, *[seeds[-1]] * missing]]
        text = pipeline.embed(filled)
        if bundle.manifest.faster is not None:
            text = np.concatenate([pipeline.embed([""] * len(filled)), text])  # (2B, L, D)
        latents = pipeline.latents_from_noise(np.concatenate(noise), text)
        pictures = pixels_from_sample(pipeline.decode(latents))
        return Draws(pictures[:count], latents[:count].astype(np.float32))

    manifest = asdict(bundle.manifest)
    decisive = json.dumps([manifest[part] for part in ("graphs", "schedule", "faster")])
    runtime = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    identity = f"bundle {hashlib.sha256(decisive.encode()).hexdigest()} on {runtime}"
    return Contender(name, draw, identity, size)


def require_family(bundle: Bundle, data: QualityData) -> None:
    """Refuse a bundle of another family: its pictures are of other things."""
    manifest = bundle.manifest
    if manifest.source.family != data.family:
        raise UsageError(
            f"{bundle.root} is of the family {manifest.source.family!r}; this quality data judges "
            f"pictures of the family {data.family!r}",
            "Give a bundle of the demo student, or --data with quality data of its own family.",
        )
    if (manifest.height_px, manifest.width_px) != (PICTURE_SIZE_PX, PICTURE_SIZE_PX):
        raise UsageError(
            f"{bundle.root} draws {manifest.width_px}x{manifest.height_px} px; the quality data "
            f"judges {PICTURE_SIZE_PX}x{PICTURE_SIZE_PX} px",
            f"Export it with --height {PICTURE_SIZE_PX} --width {PICTURE_SIZE_PX}.",
        )


# (title with the better direction, how to print it)
_ROWS: tuple[tuple[str, Callable[[Scores], str]], ...] = (
    ("pictures", lambda s: str(s.pictures)),
    ("right emoji, top-1 % ↑", lambda s: _percent(s.top1)),
    ("right emoji, top-5 % ↑", lambda s: _percent(s.top5)),
    ("right ground % ↑", lambda s: _percent(s.ground)),
    ("alignment with the prompt ↑", lambda s: _number(s.alignment)),
    ("Fréchet distance ↓", lambda s: f"{s.frechet:.2f}"),
    ("kernel distance x1000 ↓", lambda s: f"{s.kernel * 1e3:.1f} ± {s.kernel_deviation * 1e3:.1f}"),
    ("precision ↑", lambda s: _number(s.precision)),
    ("recall ↑", lambda s: _number(s.recall)),
    ("density ↑", lambda s: _number(s.density)),
    ("coverage ↑", lambda s: _number(s.coverage)),
    ("diversity, features ↑", lambda s: _number(s.feature_diversity)),
    ("diversity, pixels ↑", lambda s: _number(s.pixel_diversity)),
    ("ms a picture ↓", lambda s: "-" if s.picture_ms is None else f"{s.picture_ms:.0f}"),
    ("latents / first, PSNR dB", lambda s: _decibels(s.latents_psnr_db)),
    ("decoder rows' shares %", lambda s: _shares(s.row_shares)),
)


def quality_table(scores: Sequence[Scores], request: Request) -> Table:
    """One column per contender, one row per measure; arrows point to the better side."""
    title = f"Quality on {len(request.prompts)} prompts, {request.seeds} seed(s) each"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("measure", no_wrap=True)
    for entry in scores:
        table.add_column(escape(entry.name), justify="right", overflow="fold")
    for label, shown in _ROWS:
        table.add_row(label, *(shown(entry) for entry in scores))
    return table


def report(
    scores: Sequence[Scores], request: Request, data: QualityData, file: Path | None
) -> None:
    """Print the table, and write it as JSON with what it was measured with."""
    # Piped output is not wrapped to a narrow default.
    Console(width=None if sys.stdout.isatty() else 160).print(quality_table(scores, request))
    if file is not None:
        record = {
            "data": {
                "family": data.family,
                "corpus_sha256": data.corpus_sha256,
                "feature_network_held_out": dict(data.held_out),
            },
            "prompts": len(request.prompts),
            "seeds": request.seeds,
            "scores": [asdict(entry) for entry in scores],
        }
        with disk_errors(file):
            write_atomically(file, (json.dumps(record, indent=1) + "\n").encode())


class ComparisonSheet:
    """A contact sheet in the making: one row per prompt, one column per contender, equal noise."""

    def __init__(self, file: Path | None, request: Request) -> None:
        self._file = file
        self._prompts = [prompt.text for _, prompt in request.prompts[:_SHEET_ROWS]]
        self._seeds = request.seeds
        self._columns: dict[str, list[Image]] = {}

    def add(self, name: str, draws: Draws) -> None:
        """One contender's first picture of each shown prompt."""
        shown = draws.pictures[:: self._seeds][: len(self._prompts)]
        self._columns[name] = [image_from_pixels(picture) for picture in shown]

    def write(self) -> None:
        """Write the sheet where a file was asked for."""
        if self._file is None:
            return
        rows = list(zip(self._prompts, zip(*self._columns.values(), strict=True), strict=True))
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(rows, list(self._columns))
            save_png(sheet, self._file, {"prompt": " | ".join(self._prompts)})


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that every comparison has."""
    parser.add_argument("--data", type=Path, help="quality data folder; default: the package's")
    parser.add_argument("--prompts", type=int, default=400, help="how many of the fixed prompts")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--keep", type=Path, help="folder for draws, to resume or to score again")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sheet", type=Path, help=".png to write: prompts by contenders")


def asked_for(arguments: argparse.Namespace) -> tuple[QualityData, Request]:
    """What the options of `add_request_arguments` ask for.

    Raises `UsageError` for what cannot be asked, or could not be written after the work.
    """
    check_file("--json", arguments.json)
    check_file("--sheet", arguments.sheet)
    data = load_quality_data(arguments.data)
    return data, choose_prompts(data, arguments.prompts, arguments.seeds)


def judge(
    contenders: Sequence[Contender],
    request: Request,
    data: QualityData,
    arguments: argparse.Namespace,
) -> list[Scores]:
    """`compare` with a command's options: sheet and JSON are written, the table is printed."""
    sheet = ComparisonSheet(arguments.sheet, request)
    scores = compare(contenders, request, data, keep=arguments.keep, on_draws=sheet.add)
    sheet.write()
    report(scores, request, data, arguments.json)
    return scores


def main() -> None:
    """Compare bundles; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, action="append", required=True)
    parser.add_argument("--reference-bundle", type=Path, help="latents are held against this one's")
    parser.add_argument("--runtime", default="ort")
    parser.add_argument("--threads", type=int)
    add_request_arguments(parser)
    arguments = parser.parse_args()
    run_explained(lambda: _compare_bundles(arguments))


def _compare_bundles(arguments: Any) -> None:
    data, request = asked_for(arguments)
    first = arguments.reference_bundle
    paths = [*([first] if first else []), *(path for path in arguments.bundle if path != first)]
    options = RuntimeOptions(threads=arguments.threads)
    contenders = [bundle_contender(path, data, arguments.runtime, options) for path in paths]
    judge(contenders, request, data, arguments)


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


def _joined(parts: Sequence[Array | None]) -> Array | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _decibels(value: float | None) -> str:
    if value is None:
        return "-"
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f}"


def _shares(shares: tuple[float, ...] | None) -> str:
    return "-" if shares is None else " ".join(f"{100 * share:.1f}" for share in shares)


if __name__ == "__main__":
    main()
