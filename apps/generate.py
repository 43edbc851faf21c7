"""`tiue-export generate`: prompts to PNG files with their parameters inside."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export._version import __version__
from tiue_export.bundle import Bundle, disk_errors, open_bundle
from tiue_export.contact_sheet import contact_sheet
from tiue_export.errors import UsageError
from tiue_export.noise import check_seeds, noise_from_file
from tiue_export.picture import save_png
from tiue_export.pipeline import Picture, Pipeline
from tiue_export.specs import RuntimeOptions

from .prompt_file import prompts_in
from .tables import console, print_json

_SLUG_LENGTH = 40


@dataclass(frozen=True)
class GenerateRequest:
    """The options of `tiue-export generate`."""

    bundle: Path
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    seed: int | None = None
    count: int = 1
    out: Path = Path("pictures")
    sheet: Path | None = None
    latents: Path | None = None
    time_stages: bool = False
    runtime: str = "ort"
    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    low_memory: bool = False
    provider: str | None = None
    cuda_graph: bool | None = None
    ckpt: str | None = None
    base: str | None = None
    vae: str | None = None
    force: bool = False
    as_json: bool = False


def run(request: GenerateRequest) -> None:
    """Draw and write every picture; existing files are refused before anything is drawn."""
    prompts = [*request.prompts, *prompts_in(request.prompts_file)]
    if not prompts:
        raise UsageError(
            "no prompt was given", 'Type one in quotes: tiue-export generate BUNDLE "a red fox"'
        )
    if request.latents is not None and request.seed is not None:
        raise UsageError("--latents and --seed both say what the noise is", "Give one of them.")
    paths = _paths(request, prompts)
    _check_sheet(request)
    start = time.perf_counter()
    bundle = open_bundle(request.bundle)
    noise = None
    if request.latents is not None:
        shape = (1, *(int(side) for side in bundle.manifest.latent_shape[1:]))
        noise = noise_from_file(request.latents, shape)
    else:
        check_seeds(request.seed or 0, max(1, request.count))
    options = RuntimeOptions(
        device=request.device,
        threads=request.threads,
        low_memory=request.low_memory,
        precision=request.precision,
        checkpoint=request.ckpt,
        base=request.base,
        vae=request.vae,
        provider=request.provider,
        cuda_graph=request.cuda_graph,
    )
    written: list[Path] = []
    with Pipeline.open(bundle, request.runtime, options) as pipeline:
        _warn_of_cut_prompts(pipeline, prompts)
        opened = time.perf_counter()

        def write(picture: Picture) -> None:
            path = paths[len(written)]
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(picture.image, path, _parameters(picture, bundle, pipeline, request))
            written.append(path)
            if not request.as_json:
                console.print(str(path), markup=False, highlight=False)

        result = pipeline(
            prompts, seed=request.seed or 0, count=request.count, latents=noise, on_picture=write
        )
        device = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    drawn = time.perf_counter()
    if request.sheet is not None:
        _write_sheet(request.sheet, result.pictures, request.count)
    if request.as_json:
        print_json(
            {
                "runtime": device,
                "pictures": [
                    {"path": str(path), "prompt": picture.prompt, "seed": picture.seed}
                    for path, picture in zip(written, result.pictures, strict=True)
                ],
                **({} if request.sheet is None else {"sheet": str(request.sheet)}),
                "open_ms": round((opened - start) * 1e3, 1),
                "draw_ms": round((drawn - opened) * 1e3, 1),
                "stage_latency_ms": result.stage_latency_ms,
            }
        )
    elif request.time_stages:
        console.print(_time_table(result.stage_latency_ms, device))
        console.print(
            f"opened in {opened - start:.2f} s (hashes verified), "
            f"{len(written)} picture(s) in {drawn - opened:.2f} s"
        )


def _paths(request: GenerateRequest, prompts: list[str]) -> list[Path]:
    """One path per picture, in drawing order; none may exist without --force."""
    total = len(prompts) * request.count
    blocked = next((p for p in (request.out, *request.out.parents) if p.is_file()), None)
    if blocked is not None and request.out.suffix.lower() != ".png":
        raise UsageError(f"--out {request.out}: {blocked} is a file", "Give --out a folder.")
    if request.out.suffix.lower() == ".png":
        if total != 1:
            raise UsageError(
                f"--out {request.out} names one picture, the request makes {total}",
                "Give --out a folder.",
            )
        paths = [request.out]
    else:
        paths = [
            request.out / f"{number:04d}-{_slug(prompt)}-{_noise_name(request, i)}.png"
            for number, prompt in enumerate(prompts)
            for i in range(request.count)
        ]
    existing = [path for path in paths if path.exists()]
    if existing and not request.force:
        raise UsageError(
            f"{existing[0]} exists already"
            + (f", and {len(existing) - 1} more" if len(existing) > 1 else ""),
            "Pass --force to replace, or another --out.",
        )
    return paths


def _check_sheet(request: GenerateRequest) -> None:
    sheet = request.sheet
    if sheet is None:
        return
    if sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet is {sheet}; expected a .png file")
    if sheet.exists() and not request.force:
        raise UsageError(f"{sheet} exists already", "Pass --force to replace it.")


def _write_sheet(path: Path, pictures: Sequence[Picture], count: int) -> None:
    """One row per prompt, one column per seed."""
    rows = [pictures[first : first + count] for first in range(0, len(pictures), count)]
    titles = ["given noise" if p.seed is None else f"seed {p.seed}" for p in rows[0]]
    sheet = contact_sheet([(row[0].prompt, [p.image for p in row]) for row in rows], titles)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(sheet, path, {"prompt": " | ".join(row[0].prompt for row in rows)})


def _noise_name(request: GenerateRequest, i: int) -> str:
    if request.latents is not None:
        return _slug(request.latents.stem)
    return f"seed{(request.seed or 0) + i}"


def _slug(prompt: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:_SLUG_LENGTH].strip("-") or "prompt"


def _warn_of_cut_prompts(pipeline: Pipeline, prompts: list[str]) -> None:
    length = pipeline.tokenizer.length
    for prompt in prompts:
        tokens = pipeline.tokenizer.token_count(prompt)
        if tokens > length:
            from rich.console import Console

            Console(stderr=True).print(
                f"[yellow]note:[/] a prompt has {tokens} tokens, the last {tokens - length} are "
                f"cut: {escape(repr(prompt[:50]))}..."
            )


def _parameters(
    picture: Picture, bundle: Bundle, pipeline: Pipeline, request: GenerateRequest
) -> dict[str, object]:
    manifest = bundle.manifest
    parameters: dict[str, object] = {
        "prompt": picture.prompt,
        **({} if request.latents is None else {"latents": request.latents.name}),
        **({} if picture.seed is None else {"seed": picture.seed}),
        "steps": manifest.schedule.steps,
        "size": f"{manifest.width_px}x{manifest.height_px}",
        "model": manifest.source.name,
        "model_hash": manifest.source.sha256[:10],
        "precision": pipeline.runtime.precision,
        "runtime": f"{pipeline.runtime.name} {pipeline.runtime.device}",
        "version": f"tiue-export {__version__}",
    }
    return parameters


def _time_table(stages: Mapping[str, list[float]], device: str) -> Table:
    table = Table(title=f"Time on {device}", title_justify="left", title_style="bold")
    table.add_column("stage")
    for column in ("first ms", "median ms", "runs"):
        table.add_column(column, justify="right")
    for stage, latencies in stages.items():
        median = statistics.median(latencies[1:] or latencies)
        table.add_row(stage, f"{latencies[0]:.0f}", f"{median:.0f}", str(len(latencies)))
    return table
