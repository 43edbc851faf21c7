"""`tiue-export generate`: prompts to PNG files with their parameters inside."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.folder import disk_errors, open_bundle
from tiue_export.drawing.contact_sheet import contact_sheet
from tiue_export.drawing.picture import picture_from_file, save_png
from tiue_export.drawing.pipeline import Picture, Pipeline, Result, replanned
from tiue_export.errors import UsageError
from tiue_export.sampling.noise import check_seeds, noise_from_file
from tiue_export.sampling.plan_options import PlanChange
from tiue_export.specs import RuntimeOptions

from ..report.stages import step_bar
from ..report.tables import console, print_json
from .fastest_runtime import choice_facts, resolved_runtime
from .picture_parameters import picture_parameters
from .prompt_file import prompts_in

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
    guidance: float | None = None
    negative_prompt: str | None = None
    plan_change: PlanChange = field(default_factory=PlanChange)
    control: Path | None = None
    control_scale: float | None = None
    force: bool = False
    as_json: bool = False


def run(request: GenerateRequest) -> dict[str, object]:
    """Draw and write every picture; existing files are refused before anything is drawn.

    Returns what `as_json` prints: files, prompts, seeds and latencies.
    """
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
    bundle = replanned(open_bundle(request.bundle), request.plan_change)
    noise = None
    if request.latents is not None:
        shape = (1, *(int(side) for side in bundle.manifest.latent_shape[1:]))
        noise = noise_from_file(request.latents, shape)
    else:
        check_seeds(request.seed or 0, max(1, request.count))
    options = _runtime_options(request)
    noise_name = None if request.latents is None else request.latents.name
    if request.control is None and request.control_scale is not None:
        raise UsageError("--control-scale is how strongly a picture is followed; none was given")
    size = bundle.manifest.width_px, bundle.manifest.height_px
    control = None if request.control is None else picture_from_file(request.control, size)
    written: list[Path] = []
    runtime, chosen = resolved_runtime(
        bundle, request.runtime, options, quiet=request.as_json, control=control
    )
    with Pipeline.open(bundle, runtime, options) as pipeline:
        _warn_of_cut_prompts(pipeline, prompts)
        opened = time.perf_counter()

        def write(picture: Picture) -> None:
            path = paths[len(written)]
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(picture.image, path, picture_parameters(picture, pipeline, noise_name))
            written.append(path)
            if not request.as_json:
                console.print(str(path), markup=False, highlight=False)

        with step_bar(shown=bundle.manifest.faster is not None and not request.as_json) as on_step:
            result = pipeline(
                prompts,
                seed=request.seed or 0,
                count=request.count,
                latents=noise,
                guidance=request.guidance,
                negative_prompt=request.negative_prompt,
                control=control,
                control_scale=1.0 if request.control_scale is None else request.control_scale,
                on_picture=write,
                on_step=on_step,
            )
        device = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    drawn = time.perf_counter()
    if request.sheet is not None:
        _write_sheet(request.sheet, result.pictures, request.count)
    facts = {
        "runtime": device,
        **({} if chosen is None else {"runtime_choice": choice_facts(chosen)}),
        **_drawn_facts(request, result, written),
        "open_ms": round((opened - start) * 1e3, 1),
        "draw_ms": round((drawn - opened) * 1e3, 1),
    }
    if request.as_json:
        print_json(facts)
    elif request.time_stages:
        console.print(_time_table(result.stage_latency_ms, device))
        console.print(
            f"opened in {opened - start:.2f} s (hashes verified), "
            f"{len(written)} picture(s) in {drawn - opened:.2f} s"
        )
    return facts


def _drawn_facts(
    request: GenerateRequest, result: Result, written: Sequence[Path]
) -> dict[str, object]:
    return {
        "pictures": [
            {"path": str(path), "prompt": picture.prompt, "seed": picture.seed}
            for path, picture in zip(written, result.pictures, strict=True)
        ],
        **({} if request.sheet is None else {"sheet": str(request.sheet)}),
        "stage_latency_ms": result.stage_latency_ms,
    }


def with_resolved_runtime(request: GenerateRequest) -> GenerateRequest:
    """The same request with "auto" replaced by the fastest runtime's name."""
    quiet, options = request.as_json, _runtime_options(request)
    name, _ = resolved_runtime(request.bundle, request.runtime, options, quiet=quiet)
    return replace(request, runtime=name)


def _runtime_options(request: GenerateRequest) -> RuntimeOptions:
    return RuntimeOptions(
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
            request.out / f"{number:04d}-{slug(prompt)}-{_noise_name(request, i)}.png"
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
        return slug(request.latents.stem)
    return f"seed{(request.seed or 0) + i}"


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower case, words between hyphens, never empty."""
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


def _time_table(stages: Mapping[str, list[float]], device: str) -> Table:
    table = Table(title=f"Time on {device}", title_justify="left", title_style="bold")
    table.add_column("stage")
    for column in ("first ms", "median ms", "runs", "total ms"):
        table.add_column(column, justify="right")
    for stage, latencies in stages.items():
        median = statistics.median(latencies[1:] or latencies)
        total = sum(latencies)
        table.add_row(
            stage, f"{latencies[0]:.0f}", f"{median:.0f}", str(len(latencies)), f"{total:.0f}"
        )
    return table
