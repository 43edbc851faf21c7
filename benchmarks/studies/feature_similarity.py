"""Measure how alike a UNet's features are along a sampling run: encoder against decoder.

    python -m tiue_export.benchmarks.studies.feature_similarity PIPELINE --steps 4 10 50

The observation that one-pass students rest on (TiUE, figure (c)): from one DDIM step to another,
the encoder's features change less than the decoder's. For each step count T and each prompt, the
outputs of all down, mid and up blocks are kept over the run, flattened, and compared by cosine
between all pairs of steps. Takes a diffusers folder with unet, text_encoder, tokenizer and
scheduler; the VAE is not read. Step counts already in the JSON file are not measured again.

The order alone says little about training: random weights show it too, and the saturation (the tiny
family, four seeds). Compare with such a baseline of the same shape before drawing conclusions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tiue_export.bundle.manifest import structured
from tiue_export.checkpoint.tensors import sha256_of_files
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import BundleError, CheckpointError, RuntimeFailure, UsageError, first_line
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.load import load_student
from tiue_export.methods.scheduler import ddim_arguments, diffusers_scheduler
from tiue_export.reference.key_step_analysis import DEFAULT_PROMPTS
from tiue_export.reference.unet_blocks import named_blocks, watched_blocks
from tiue_export.registry.spokes import run_explained
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.noise import check_seeds, noise_from_seed
from tiue_export.student.model import Student
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors

from ..figure import check_file, check_plot
from ..latency.environment import describe_environment
from ..torch_pipeline import TorchPipeline
from .feature_similarity_report import (
    PAPER,
    Similarity,
    StepRun,
    curves_of,
    report,
    save_plot,
    similarity_table,
    statements,
    summarise,
)

_NEEDED = ("unet", "text_encoder", "tokenizer", "scheduler")


def similarity_over_steps(features: Tensor) -> Similarity:
    """Features (T, N) of T >= 2 steps -> mean cosines over pairs of different steps.

    From the Gram matrix of the normalised rows; the diagonal, always 1, is left out.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    gram = (unit @ unit.T).double().cpu()  # (T, T)
    count = len(gram)
    upper = gram[tuple(torch.triu_indices(count, count, 1))]  # (T (T - 1) / 2,)
    return Similarity(
        float(upper.mean()), float(gram[0, 1:].mean()), float(gram.diagonal(1).mean())
    )


@dataclass(frozen=True)
class Settings:
    """What is drawn: prompt i from the noise of seed i, at guidance g (1: none).

    Guidance is counted as diffusers does; its unconditional half is the empty prompt.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float = 1.0


@dataclass(frozen=True)
class LoadedPipeline(TorchPipeline):
    """What a sampling run needs, float32 on one device, without the VAE.

    `scheduler` holds DDIMScheduler's arguments, and `sha256` covers weights, configurations and
    vocabulary.
    """

    name: str
    sha256: str
    scheduler: Mapping[str, Any]


def load_pipeline(folder: Path, device: str = "cpu") -> LoadedPipeline:
    """Read unet, text_encoder, tokenizer and scheduler of a diffusers pipeline folder.

    Raises `UsageError` for a path that is no folder, `CheckpointError` for an incomplete one, and
    whatever `load_student` raises for weights that fit no Stable Diffusion 1.x/2.x UNet.
    """
    next_step = "Give the folder that holds model_index.json, with all its parts."
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; expected a diffusers "
            "pipeline folder",
            next_step,
        )
    missing = [f"{part}/" for part in _NEEDED if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is no diffusers pipeline folder: it lacks {', '.join(missing)}", next_step
        )
    student = load_student(folder, without=("vae",)).to(torch.device(device), torch.float32)
    return LoadedPipeline(
        student,
        tokenizer_of(folder / "tokenizer", shapes_of(student).tokens),
        folder.resolve().name,
        _sha256(folder, student),
        # The paper's spacing in figure (c).
        {**ddim_arguments(student.scheduler_config), "timestep_spacing": "leading"},
    )


def _sha256(folder: Path, student: Student) -> str:
    """One digest over the weights' digests and every small file beside them."""
    files = (path for part in _NEEDED for path in (folder / part).iterdir())
    small = sorted(path for path in files if path.suffix in {".json", ".txt"})
    parts = [student.source.sha256, *student.source.part_sha256.values()]
    return hashlib.sha256("\n".join([*parts, sha256_of_files(small, folder)]).encode()).hexdigest()


def block_outputs(
    pipeline: LoadedPipeline,
    noise: Tensor,
    text: Tensor,
    steps: int,
    guidance: float = 1.0,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """One DDIM run (eta 0) of `steps` steps; each block's outputs, float32 (steps, C*h*w).

    `noise` (1, 4, H, W); `text` (1, L, D), or (2, L, D) with the unconditional row first, which
    `guidance` other than 1 needs. At 512 px (SD 2.1) a step of all blocks takes 25 MB.
    """
    scheduler, unet = diffusers_scheduler(pipeline.scheduler, "ddim", steps), pipeline.student.unet
    rows: dict[str, list[Tensor]] = {name: [] for name in named_blocks(unet)}
    with watched_blocks(unet, lambda name, row: rows[name].append(row.flatten())):
        pipeline.sample(scheduler, noise.to(unet.device), text, guidance, on_step)
    return {name: torch.stack(block) for name, block in rows.items()}


def measure(
    pipeline: LoadedPipeline,
    settings: Settings,
    steps: int,
    on_step: Callable[[], None] = lambda: None,
) -> StepRun:
    """All prompts at one step count; one prompt's features are in memory at a time.

    Raises `RuntimeFailure` when the UNet's features are not finite.
    """
    start, shape = time.perf_counter(), shapes_of(pipeline.student).latents
    blocks: dict[str, list[Similarity]] = {}
    for prompt, seed in zip(settings.prompts, settings.seeds, strict=True):
        noise = torch.from_numpy(noise_from_seed(seed, shape))
        text = pipeline.embed([prompt] if settings.guidance == 1 else ["", prompt])
        rows = block_outputs(pipeline, noise, text, steps, settings.guidance, on_step)
        for name in list(rows):
            similarity = similarity_over_steps(rows.pop(name))
            if not all(map(math.isfinite, astuple(similarity))):
                raise RuntimeFailure(
                    f"{name} gave non-finite features at T={steps} for {prompt[:50]!r}",
                    "The weights diverge; try a lower --guidance or an earlier checkpoint.",
                )
            blocks.setdefault(name, []).append(similarity)
    return StepRun(
        steps,
        one_pass_plan(pipeline.scheduler, steps).timesteps,
        time.perf_counter() - start,
        {name: tuple(prompts) for name, prompts in blocks.items()},
    )


def read_prompts(source: str) -> list[str]:
    """Prompts of a UTF-8 file, one a line; "default" gives everyday ones that ship with this."""
    if source == "default":
        return list(DEFAULT_PROMPTS)
    next_step = "Write one prompt a line, or pass --prompts default."
    try:
        lines = Path(source).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = f"--prompts {source} cannot be read as UTF-8 text: {first_line(error)}"
        raise UsageError(said, next_step) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {source} holds no prompt", next_step)
    return prompts


def read_runs(path: Path, request: Mapping[str, Any]) -> dict[int, StepRun]:
    """The step counts that a JSON file of the same request already holds.

    Raises `UsageError` when the file is something else, or answers another request.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
        found = dict(data["request"])
        runs: tuple[StepRun, ...] = structured(tuple[StepRun, ...], data["runs"], str(path))
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        raise UsageError(
            f"--json {path} exists and is no result of this benchmark",
            "Choose another file, or pass --force to replace it.",
        ) from error
    wanted = json.loads(json.dumps(request))
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        raise UsageError(
            f"--json {path} holds a measurement with another {', another '.join(changed)}",
            "Choose another file, or pass --force to measure all of it anew.",
        )
    return {run.steps: run for run in runs}


def describe_request(pipeline: LoadedPipeline, settings: Settings) -> dict[str, Any]:
    """All that decides the numbers of one step count."""
    return {
        "pipeline": pipeline.name,
        "pipeline_sha256": pipeline.sha256,
        "latent_shape": shapes_of(pipeline.student).latents,
        "scheduler": {"class": "DDIMScheduler", "eta": 0.0, **pipeline.scheduler},
        **asdict(settings),
        "dtype": "float32",
        "device": str(pipeline.student.unet.device),
    }


def write_result(path: Path, request: Mapping[str, Any], runs: Mapping[int, StepRun]) -> None:
    """Replace the JSON file: environment, request, summary, verdict, paper's curves, all runs."""
    ordered = [runs[steps] for steps in sorted(runs)]
    result = {
        "what": "mean cosine similarity of UNet block outputs between DDIM steps",
        "environment": asdict(describe_environment()),
        "torch_threads": torch.get_num_threads(),
        "request": request,
        **report([summarise(run) for run in ordered]),
        "runs": [asdict(run) for run in ordered],
    }
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, print the table and the verdict, write JSON and plot."""
    _check(arguments)
    prompts = read_prompts(arguments.prompts)
    settings = Settings(
        tuple(prompts[i % len(prompts)] for i in range(arguments.count)),
        tuple(range(arguments.seed, arguments.seed + arguments.count)),
        arguments.guidance,
    )
    pipeline = load_pipeline(arguments.pipeline, _device(arguments.device))
    for steps in arguments.steps:
        one_pass_plan(pipeline.scheduler, steps)  # raises for what the scheduler cannot do
    request = describe_request(pipeline, settings)
    runs: dict[int, StepRun] = {}
    if arguments.json is not None and not arguments.force:
        runs = read_runs(arguments.json, request)
    missing = sorted(set(arguments.steps) - set(runs))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=sum(missing) * arguments.count)
        for steps in missing:
            progress.update(task, description=f"UNet steps, T={steps}")
            runs[steps] = measure(pipeline, settings, steps, lambda: progress.advance(task))
            if arguments.json is not None:
                write_result(arguments.json, request, runs)
    summary = [summarise(runs[steps]) for steps in sorted(runs)]
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(similarity_table(summary))
    for sentence in statements(curves_of(summary)):
        console.print(sentence, highlight=False)
    if arguments.plot is not None:
        save_plot(summary, arguments.plot, pipeline.name, _note(settings))
    for what, path in (("numbers", arguments.json), ("plot", arguments.plot)):
        if path is not None:
            console.print(f"{what}: {path}", markup=False, highlight=False)


def _note(settings: Settings) -> str:
    guidance = "no guidance" if settings.guidance == 1 else f"guidance {settings.guidance:g}"
    return (
        f"Cosine of flattened block outputs, averaged over all pairs of steps, blocks and "
        f"{len(settings.prompts)} prompts; DDIM, 'leading' timesteps, eta 0, {guidance}"
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be honoured before anything is loaded."""
    small = [steps for steps in arguments.steps if steps < 2]
    if small:
        raise UsageError(f"--steps is {small[0]}; expected 2 or more: pairs of steps are compared")
    if arguments.count < 1:
        raise UsageError(f"--count is {arguments.count}; expected 1 or more")
    check_seeds(arguments.seed, arguments.count)
    if not (math.isfinite(arguments.guidance) and arguments.guidance >= 1):
        raise UsageError(
            f"--guidance is {arguments.guidance}; expected 1 (none) or more, 7.5 is usual"
        )
    check_file("--json", arguments.json)
    check_plot(arguments.plot)


def _device(name: str) -> str:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda: torch finds no CUDA device", "Pass --device cpu.")
    return ("cuda" if available else "cpu") if name == "auto" else name


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tiue_export.benchmarks.studies.feature_similarity",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    add = parser.add_argument
    add("pipeline", type=Path, help="diffusers pipeline folder")
    add("--prompts", default="default", metavar="FILE", help="one prompt a line, or: default")
    steps = "step counts [default: the paper's, 4 to 49]"
    add("--steps", type=int, nargs="+", default=PAPER.steps, metavar="T", help=steps)
    add("--count", type=int, default=16, help="runs per T; prompts repeat with other seeds [16]")
    add("--seed", type=int, default=0, help="run i uses seed + i [0]")
    add("--guidance", type=float, default=1.0, help="1: none [1]")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", type=Path, metavar="FILE", help="all numbers; resumed if there")
    add("--plot", type=Path, metavar="FILE.png", help="needs tiue-export[bench]")
    add("--force", action="store_true", help="measure again what --json holds")
    given = parser.parse_args(arguments)
    run_explained(lambda: run(given))


if __name__ == "__main__":
    main()
