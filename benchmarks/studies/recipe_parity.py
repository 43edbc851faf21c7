"""Every recipe on every runtime against diffusers' own unmodified pipeline, on small random models.

    python -m tiue_export.benchmarks.studies.recipe_parity --out recipe-parity.json

Each model is drawn by diffusers' pipeline with the scheduler that its authors name, and by its
exported bundle on PyTorch, ONNX Runtime, OpenVINO and, converted to float32 packages, by the
evaluator of Core ML programs: the same prompt and the very noises that diffusers drew. What is
told is the PSNR of the latents. Rectified flow and a lone x0 have no pipeline there; their formulas
are written out here, around the whole UNet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from diffusers.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table

from tiue_export.bundle.read import Bundle
from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.export.coreml.bundle import compile_coreml
from tiue_export.export.coreml.profiles import CoremlOptions
from tiue_export.export.onnx.bundle import export_onnx
from tiue_export.export.openvino import compile_openvino
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.registry.spokes import run_explained
from tiue_export.sampling.recipes import recipe_named, recipes
from tiue_export.sampling.sampler import sample
from tiue_export.specs import Array, RuntimeOptions
from tiue_export.student.model import Student
from tiue_export.student.paired_text_encoder import PairedTextEncoder
from tiue_export.system.owned_path import temporary_folder

from .small_models import SIDE, small_model

_PROMPT = "a red fox in the snow"
_GENERATOR = 7
_SCHEDULERS: dict[str, Any] = {
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
}


@dataclass(frozen=True)
class Case:
    """A recipe in so many steps on a UNet of one shape."""

    recipe: str
    steps: int
    shape: str = "SD"


@dataclass(frozen=True)
class Row:
    """What was measured: PSNR in dB of the latents by runtime, and how many noises were drawn."""

    case: Case
    noises: int
    one_pass: bool
    psnr_db: dict[str, float] = field(default_factory=dict)


def cases() -> list[Case]:
    """Every recipe in its usual steps and in its fewest, on SD's shape and on SDXL's; SDXS's,
    tiny-sd's, SSD-1B's and Vega's shapes too."""
    listed = []
    for name, recipe in recipes().items():
        shapes = {"lcm": ("LCM", "LCM-SDXL"), "sdxs": ("SDXS", "")}.get(name, ("SD", "SDXL"))
        listed += [
            Case(name, steps, shape)
            for shape, sdxl in zip(shapes, (False, True), strict=True)
            if recipe.is_for(sdxl)
            for steps in dict.fromkeys((recipe.usual_steps, min(recipe.steps), 4))
            if steps in recipe.steps
        ]
    small = [Case("lcm-lora", 4, "tiny-sd"), Case("sd-turbo", 1, "tiny-sd")]
    relatives = [Case("lcm-lora", 4, "SSD-1B"), Case("lcm-lora", 4, "Vega")]
    return [*listed, *small, *relatives]


def measure(case: Case, models: Path, work: Path) -> Row:
    """Draw one case everywhere."""
    folder = small_model(case.shape, models)
    options = SamplingOptions(recipe=case.recipe, steps=case.steps)
    student = load_for_method(CheckpointRequest(str(folder)), None, options)
    plan = student.plan
    noises, expected = reference(student, folder)
    bundle = export_onnx(student, work / "bundle", force=True)
    bundle = compile_coreml(compile_openvino(bundle), student, CoremlOptions(precision="fp32"))
    row = Row(case, plan.noises, plan.one_pass)
    row.psnr_db["torch"] = _decibels(expected, torch_latents(student, bundle, noises))
    for name, precision in (("ort", "auto"), ("openvino", "fp32"), ("coreml", "auto")):
        with Pipeline.open(bundle, name, RuntimeOptions(precision=precision)) as pipeline:
            drawn = pipeline(_PROMPT, latents=noises[:, 0]).pictures[0].latents
        row.psnr_db[name] = _decibels(expected, drawn[None])
    return row


def reference(student: Student, folder: Path) -> tuple[Array, Array]:
    """The noises (N, 1, 4, H, W) and what diffusers draws from them: latents (1, 4, H, W)."""
    plan, recipe = student.plan, recipe_named(student.plan.recipe)
    shape = (1, 4, SIDE, SIDE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    drawn = torch.Generator().manual_seed(_GENERATOR)
    fresh = [torch.randn(shape, generator=drawn) for _ in range(plan.noises - 1)]
    noises = np.stack([noise, *fresh])
    embeds = plan.embedded_guidance is not None
    kind: Any = LatentConsistencyModelPipeline if embeds else StableDiffusionPipeline
    unchecked = {"safety_checker": None, "requires_safety_checker": False}
    if isinstance(student.text_encoder, PairedTextEncoder):
        kind, unchecked = StableDiffusionXLPipeline, {}
    with quiet_libraries():
        disable_progress_bar()
        pipe = kind.from_pretrained(folder, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    if plan.scheduler not in _SCHEDULERS:
        text = pipe.encode_prompt(_PROMPT, "cpu", 1, False)[0]
        return noises, _written_out(student, noise, text)
    scheduler = _SCHEDULERS[plan.scheduler]
    predicts = {"prediction_type": recipe.prediction_type} if recipe.prediction_type else {}
    pipe.scheduler = scheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", **predicts
    )
    call: dict[str, Any] = {"num_inference_steps": plan.steps}
    if plan.steps in recipe.timesteps:
        call = {"timesteps": list(recipe.timesteps[plan.steps])}
    if plan.scheduler == "tcd":
        call["eta"] = plan.eta
    latents = pipe(
        _PROMPT,
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(_GENERATOR),
        guidance_scale=plan.embedded_guidance or plan.guidance or 0.0,
        output_type="latent",
        **call,
    ).images
    return noises, latents.numpy()


@torch.no_grad()
def _written_out(student: Student, noise: torch.Tensor, text: torch.Tensor) -> Array:
    """The formulas of InstaFlow and SwiftBrush."""
    plan, sampled = student.plan, noise
    if plan.scheduler == "flow":
        for step in range(plan.steps):
            time = 1000 * (1 - step / plan.steps)
            sampled = sampled + student.unet(sampled, time, text).sample / plan.steps
    else:
        alpha = 0.0047
        output = student.unet(sampled, 999, text).sample
        sampled = (sampled - (1 - alpha) ** 0.5 * output) / alpha**0.5
    latents: Array = sampled.numpy()
    return latents


def torch_latents(student: Student, bundle: Bundle, noises: Array) -> Array:
    """The student's own graphs, run by PyTorch."""
    graphs = {graph.spec.name: graph for graph in build_graphs(student, ExportOptions())}

    def run(name: str, pool: Any) -> Any:
        return run_graph(graphs[name], pool)[1]

    with Pipeline.open(bundle) as pipeline:
        texts = [
            run("text_encoder", {"input_ids": pipeline.tokenizer([prompt])})["last_hidden_state"]
            for prompt in (["", _PROMPT] if student.plan.copies == 2 else [_PROMPT])
        ]
    return sample(student.plan, run, noises, np.concatenate(texts))


def _decibels(expected: Array, value: Array) -> float:
    return round(psnr_db(expected, value), 1)


def measured(chosen: list[Case], tell: Callable[[str], None]) -> Iterator[Row]:
    """All cases in turn."""
    with temporary_folder() as work:
        for number, case in enumerate(chosen):
            tell(f"{number + 1} of {len(chosen)}: {case.recipe}, {case.steps} steps, {case.shape}")
            yield measure(case, work / "models", work)


def table(rows: list[Row]) -> Table:
    """One line a case, one column a runtime."""
    shown = Table("recipe", "UNet", "steps", "noises", *rows[0].psnr_db)
    for row in rows:
        case, values = row.case, (f"{value:.0f}" for value in row.psnr_db.values())
        shown.add_row(case.recipe, case.shape, str(case.steps), str(row.noises), *values)
    return shown


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--recipe", action="append", help="only these; default: all")
    parser.add_argument("--shape", action="append", help="only these UNets; default: all")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    console = Console(stderr=True)

    def run() -> None:
        chosen = [
            case
            for case in cases()
            if arguments.recipe is None or case.recipe in arguments.recipe
            if arguments.shape is None or case.shape in arguments.shape
        ]
        rows = list(measured(chosen, console.print))
        Console().print(table(rows))
        if arguments.out is not None:
            text = json.dumps([asdict(row) for row in rows], indent=1)
            arguments.out.write_text(text + "\n", "utf-8")

    run_explained(run)


if __name__ == "__main__":
    main()
