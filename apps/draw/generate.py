"""`tiue-export generate`: prompts to PNG files with their parameters inside."""

from __future__ import annotations

import re
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.read import MANIFEST_FILE, Bundle, open_bundle
from tiue_export.drawing.contact_sheet import contact_sheet
from tiue_export.drawing.picture import parameters_from_png, picture_from_file, save_png
from tiue_export.drawing.picture_parameters import picture_parameters
from tiue_export.drawing.pipeline import (
    Picture,
    Pipeline,
    Result,
    check_steering,
    picture_to_follow,
    replanned,
)
from tiue_export.drawing.prompt_weights import without_weights
from tiue_export.drawing.source_picture import SourcePicture, source_picture
from tiue_export.drawing.start import (
    check_takes_pictures,
    refuse_without_picture,
    started_change,
)
from tiue_export.errors import UsageError, printable
from tiue_export.sampling.noise import check_picture_count, check_seeds, noise_from_file
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.specs import CONTROLNET, Array
from tiue_export.system.disk_errors import disk_errors

from ..options.generate import DrawOptions, PictureOutput, PromptOptions
from ..report.stages import step_bar
from ..report.tables import console, numbers, print_json, titled
from .fastest_runtime import choice_facts, resolved_runtime
from .prompt_file import prompts_in

_SLUG_LENGTH = 40


def run(draw: DrawOptions) -> dict[str, object]:
    """Draw and write every picture; other pictures of their names are refused before that.

    Where all of them are there, by the same bundle and request, nothing is drawn. Returns what
    `--json` prints: files, prompts, seeds and latencies.
    """
    _refuse_swapped(draw)
    prompts = _prompts(draw)
    paths = _paths(draw, prompts)
    there = _existing(draw, paths)
    _check_sheet(draw)
    start = time.perf_counter()
    bundle = _planned(draw, open_bundle(draw.bundle))
    source = _source(draw, bundle)
    noise, control = _noise(draw, bundle), _control(draw, bundle)
    options, quiet = draw.runtime_options(draw), draw.as_json
    written: list[Path] = []
    name, chosen = resolved_runtime(bundle, draw.runtime, options, quiet=quiet, control=control)
    with Pipeline.open(bundle, name, options) as pipeline:
        _warn_of_cut_prompts(pipeline, prompts, weighted=draw.prompt_weights)
        opened = time.perf_counter()
        if there:
            expected = _expected(draw, prompts, pipeline)
            _refuse_others(there, dict(zip(paths, expected, strict=True)))
        if there and len(there) == len(paths) and draw.sheet is None:
            return _tell_there(draw, there, f"{pipeline.runtime.name} {pipeline.runtime.device}")

        def write(picture: Picture) -> None:
            path = paths[len(written)]
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(picture.image, path, _parameters(picture, draw.latents))
            written.append(path)
            if not quiet:
                console.print(str(path), markup=False, highlight=False)

        with step_bar(shown=not bundle.manifest.plan.one_pass and not quiet) as on_step:
            result = pipeline(
                prompts,
                seed=draw.seed or 0,
                count=draw.count,
                latents=noise,
                guidance=draw.guidance,
                negative_prompt=draw.negative,
                prompt_weights=draw.prompt_weights,
                control=control,
                control_scale=1.0 if draw.control_scale is None else draw.control_scale,
                image=source,
                strength=draw.strength,
                steps=None if source is None else draw.steps,
                sampled=draw.sampled,
                on_picture=write,
                on_step=on_step,
            )
        device = f"{pipeline.runtime.name} {pipeline.runtime.device}"
    drawn = time.perf_counter()
    if draw.sheet is not None:
        _write_sheet(draw.sheet, result.pictures, draw.count)
    facts = {
        "runtime": device,
        **({} if chosen is None else {"runtime_choice": choice_facts(chosen)}),
        **_drawn_facts(draw, result, written),
        "open_ms": round((opened - start) * 1e3, 1),
        "draw_ms": round((drawn - opened) * 1e3, 1),
    }
    if quiet:
        print_json(facts)
    elif draw.time_stages:
        console.print(_time_table(result.stage_latency_ms, device))
        console.print(
            f"opened in {opened - start:.2f} s (hashes verified), "
            f"{len(written)} picture(s) in {drawn - opened:.2f} s"
        )
    return facts


def _refuse_swapped(what: PromptOptions) -> None:
    """A bundle after its prompt is a slip, not a picture to draw."""
    if what.bundle.exists():
        return
    for number, prompt in enumerate(what.prompts):
        if (Path(prompt) / MANIFEST_FILE).is_file():
            prompts = [str(what.bundle), *what.prompts[:number], *what.prompts[number + 1 :]]
            raise UsageError(
                f"{prompt} is a bundle and stands where a prompt is expected",
                "The bundle comes first: tiue-export generate "
                + " ".join(shlex.quote(word) for word in (prompt, *prompts)),
            )


def _prompts(what: PromptOptions) -> list[str]:
    """Every prompt; a request without one, or with two kinds of noise, is refused."""
    prompts = [*what.prompts, *prompts_in(what.prompts_file)]
    if not prompts:
        raise UsageError(
            "no prompt was given", 'Type one in quotes: tiue-export generate BUNDLE "a red fox"'
        )
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError(
            "a prompt is empty", 'Type one in quotes: tiue-export generate BUNDLE "a red fox"'
        )
    if what.latents is not None and what.seed is not None:
        raise UsageError("--latents and --seed both say what the noise is", "Give one of them.")
    return prompts


def _noise(what: PromptOptions, bundle: Bundle) -> Array | None:
    """The plan's noises from `--latents`, (N, 4, H, W) float32; None where seeds give them."""
    if what.latents is None:
        check_seeds(what.seed or 0, max(1, what.count))
        return None
    manifest = bundle.manifest
    shape = (manifest.plan.noises, *(int(side) for side in manifest.latent_shape[1:]))
    return noise_from_file(what.latents, shape)


def _parameters(picture: Picture, latents: Path | None) -> Mapping[str, object]:
    """With the name of the file that the noise came from, in place of a seed."""
    if latents is None:
        return picture.parameters
    return {"prompt": picture.prompt, "latents": printable(latents.name), **picture.parameters}


def _planned(draw: DrawOptions, bundle: Bundle) -> Bundle:
    """The bundle with the plan that was asked for, as far as no picture decides it."""
    change = PlanChange(draw.steps, draw.key_steps, draw.inject, draw.max_decoder_rows)
    if draw.image is None:
        return replanned(bundle, change)
    check_takes_pictures(bundle)
    plan, masked = bundle.manifest.plan, draw.mask is not None
    started = started_change(plan, draw.strength, draw.steps, masked=masked)
    # As a whole, so that what contradicts itself is refused; the picture brings steps and strength.
    replanned(bundle, replace(change, strength=started.strength))
    return replanned(bundle, replace(change, steps=None))


def _source(draw: DrawOptions, bundle: Bundle) -> SourcePicture | None:
    """The picture to start from, at the bundle's size; what was done to it is told."""
    if draw.image is None:
        refuse_without_picture(mask=draw.mask, strength=draw.strength, sampled=draw.sampled)
        return None
    size = bundle.manifest.width_px, bundle.manifest.height_px
    source = source_picture(draw.image, size, draw.mask)
    for note in source.notes:
        Console(stderr=True).print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    return source


def _control(what: PromptOptions, bundle: Bundle) -> Array | None:
    """The picture that a ControlNet follows, at the bundle's size."""
    if what.control is None:
        if what.control_scale is not None:
            raise UsageError(
                "--control-scale is how strongly a picture is followed; none was given"
            )
        if CONTROLNET in bundle.manifest.graphs:
            raise picture_to_follow(bundle)
        return None
    return picture_from_file(what.control, (bundle.manifest.width_px, bundle.manifest.height_px))


def _drawn_facts(
    output: PictureOutput, result: Result, written: Sequence[Path]
) -> dict[str, object]:
    return {
        "pictures": [
            {"path": str(path), "prompt": picture.prompt, "seed": picture.seed}
            for path, picture in zip(written, result.pictures, strict=True)
        ],
        **({} if output.sheet is None else {"sheet": str(output.sheet)}),
        "stage_latency_ms": result.stage_latency_ms,
    }


def _paths(draw: DrawOptions, prompts: list[str]) -> list[Path]:
    """One path per picture, in drawing order."""
    out = draw.out
    total = len(prompts) * draw.count
    check_picture_count(total)
    blocked = next((p for p in (out, *out.parents) if p.is_file()), None)
    if blocked is not None and out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: {blocked} is a file", "Give --out a folder.")
    if out.suffix.lower() == ".png":
        if total != 1:
            raise UsageError(
                f"--out {out} names one picture, the request makes {total}",
                "Give --out a folder.",
            )
        return [out]
    return [
        out / f"{number:04d}-{slug(prompt)}-{_noise_name(draw, i)}.png"
        for number, prompt in enumerate(prompts)
        for i in range(draw.count)
    ]


def _existing(draw: DrawOptions, paths: list[Path]) -> list[Path]:
    """Those that are there and may not be replaced; refused where nothing can tell them apart."""
    existing = [] if draw.force else [path for path in paths if path.exists()]
    files = draw.latents, draw.control, draw.image
    if existing and any(file is not None for file in files):
        raise _in_the_way(existing, "drawn from a file, which a picture does not hold")
    return existing


def _expected(draw: DrawOptions, prompts: list[str], pipeline: Pipeline) -> list[dict[str, object]]:
    """What the picture of each path will say of itself."""
    usual = pipeline.bundle.manifest.plan.guidance
    if draw.guidance is not None or draw.negative is not None:
        check_steering(pipeline.bundle, draw.guidance is not None)
    scale = usual if usual is None or draw.guidance is None else draw.guidance
    return [
        picture_parameters(
            *(prompt, (draw.seed or 0) + i, draw.negative or "", scale, draw.prompt_weights),
            pipeline.bundle.manifest,
            pipeline.runtime,
        )
        for prompt in prompts
        for i in range(draw.count)
    ]


def _refuse_others(there: list[Path], expected: Mapping[Path, Mapping[str, object]]) -> None:
    """Refuse to replace pictures that another request or bundle has drawn."""
    for path in there:
        found, wanted = _parameters_of(path), expected[path]
        for name in (*wanted, *found):
            if found.get(name) != wanted.get(name):
                here = wanted.get(name, "none")
                was = f"{found[name]}, here {here}" if name in found else "not told"
                raise _in_the_way(there, f"of another request: its {name} is {was}")


def _parameters_of(path: Path) -> Mapping[str, object]:
    try:
        return parameters_from_png(path) or {}
    except Exception:  # PIL and json raise many kinds on foreign files: none of ours
        return {}


def _in_the_way(there: list[Path], why: str) -> UsageError:
    more = f", and {len(there) - 1} more" if len(there) > 1 else ""
    return UsageError(
        f"{there[0]} exists already{more}, {why}", "Pass --force to replace, or another --out."
    )


def _tell_there(draw: DrawOptions, there: list[Path], device: str) -> dict[str, object]:
    """Equal parameters give equal pictures: what was asked for is done."""
    facts: dict[str, object] = {
        "runtime": device,
        "already_there": True,
        "pictures": [
            {"path": str(path), **{key: _parameters_of(path)[key] for key in ("prompt", "seed")}}
            for path in there
        ],
        "stage_latency_ms": {},
    }
    if draw.as_json:
        print_json(facts)
        return facts
    for path in there:
        console.print(f"{path}: already there, of the same request", markup=False, highlight=False)
    return facts


def _check_sheet(output: PictureOutput) -> None:
    sheet = output.sheet
    if sheet is None:
        return
    if sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet is {sheet}; expected a .png file")
    if sheet.exists() and not output.force:
        raise UsageError(f"{sheet} exists already", "Pass --force to replace it.")


def _write_sheet(path: Path, pictures: Sequence[Picture], count: int) -> None:
    """One row per prompt, one column per seed."""
    rows = [pictures[first : first + count] for first in range(0, len(pictures), count)]
    titles = ["given noise" if p.seed is None else f"seed {p.seed}" for p in rows[0]]
    sheet = contact_sheet([(row[0].prompt, [p.image for p in row]) for row in rows], titles)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(sheet, path, {"prompt": " | ".join(row[0].prompt for row in rows)})


def _noise_name(what: PromptOptions, i: int) -> str:
    if what.latents is not None:
        return slug(what.latents.stem)
    return f"seed{(what.seed or 0) + i}"


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower case, words between hyphens, never empty."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return words[:_SLUG_LENGTH].strip("-") or "prompt"


def _warn_of_cut_prompts(pipeline: Pipeline, prompts: list[str], *, weighted: bool) -> None:
    for prompt in prompts:
        words = without_weights(prompt) if weighted else prompt
        note = pipeline.tokenizer.cut_note(words)
        if note is not None:
            Console(stderr=True).print(f"[yellow]note:[/] {note}: {escape(repr(prompt[:50]))}...")


def _time_table(stages: Mapping[str, list[float]], device: str) -> Table:
    times = numbers("first ms", "median ms", "runs", "total ms")
    table = titled(f"Time on {device}", "stage", *times)
    for stage, latencies in stages.items():
        median = statistics.median(latencies[1:] or latencies)
        total = sum(latencies)
        table.add_row(
            stage, f"{latencies[0]:.0f}", f"{median:.0f}", str(len(latencies)), f"{total:.0f}"
        )
    return table
