"""Drawing from a picture on every runtime against diffusers' own pipelines, on small random models.

    python -m tiue_export.benchmarks.studies.picture_parity --out picture-parity.json

Each model is drawn by diffusers' unmodified img2img or inpainting pipeline, and by its exported
bundle on ONNX Runtime and OpenVINO: the same prompt, picture and mask, and the very noises that
diffusers drew. What is told is the PSNR of the latents. diffusers is given the latents of the
picture, which are its VAE's own mean: its pipelines sample them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from PIL import Image
from rich.console import Console
from rich.table import Table

from tiue_export.checkpoint.parts import quiet_libraries
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.drawing.source_picture import SourcePicture, source_picture
from tiue_export.export.onnx.bundle import export_onnx
from tiue_export.export.openvino import compile_openvino
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import Array, RuntimeOptions
from tiue_export.system.owned_path import temporary_folder

from .small_models import small_model

PROMPT = "a red fox in the snow"
_GENERATOR = 7
_FREE = MappingProxyType({"guidance_scale": 0.0})
# (diffusers' plain pipeline, its img2img, its inpainting) of the two kinds of model.
_PIPELINES: Mapping[bool, tuple[Any, Any, Any]] = {
    False: (
        StableDiffusionPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    ),
    True: (
        StableDiffusionXLPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLInpaintPipeline,
    ),
}


@dataclass(frozen=True)
class Case:
    """A sampler of so many steps, of which a share is done; `recipe` "" is Faster Diffusion."""

    recipe: str
    steps: int
    strength: float
    scheduler: Any = field(compare=False)
    call: Mapping[str, Any] = field(default_factory=lambda: _FREE, compare=False)
    masked: bool = False
    shape: str = "SD"

    @property
    def kind(self) -> str:
        """What diffusers calls it."""
        return "inpainting" if self.masked else "img2img"


@dataclass(frozen=True)
class Row:
    """What was measured: PSNR in dB of the latents by runtime, and how many steps were done."""

    recipe: str
    shape: str
    kind: str
    steps: int
    strength: float
    done: int
    psnr_db: dict[str, float] = field(default_factory=dict)


def cases() -> list[Case]:
    """One of each sampler, from a picture and inside of a mask, at strengths that leave some."""
    guided = {"guidance_scale": 5.0}
    tcd = {**_FREE, "eta": 0.3}
    return [
        Case("sd-turbo", 2, 0.5, EulerDiscreteScheduler),
        Case("sd-turbo", 4, 0.8, EulerDiscreteScheduler),
        Case("euler-ancestral", 4, 0.6, EulerAncestralDiscreteScheduler),
        Case("lcm", 4, 0.6, LCMScheduler, {"guidance_scale": 8.0}, shape="LCM"),
        Case("hyper-sd-4", 4, 0.5, DDIMScheduler),
        Case("tcd", 4, 0.75, TCDScheduler, tcd),
        Case("pcm-cfg", 4, 0.5, TCDScheduler, {"guidance_scale": 7.5}),
        Case("", 10, 0.3, DDIMScheduler, guided),
        Case("", 10, 0.8, DDIMScheduler, guided),
        Case("sdxl-turbo", 2, 0.5, EulerAncestralDiscreteScheduler, shape="SDXL"),
        Case("sd-turbo", 4, 1.0, EulerDiscreteScheduler, masked=True),
        Case("euler-ancestral", 4, 0.75, EulerAncestralDiscreteScheduler, masked=True),
        Case("hyper-sd-4", 4, 1.0, DDIMScheduler, masked=True),
        Case("tcd", 4, 0.5, TCDScheduler, tcd, masked=True),
        Case("", 10, 0.7, DDIMScheduler, guided, masked=True),
        Case("lightning", 4, 1.0, EulerDiscreteScheduler, masked=True, shape="SDXL"),
    ]


def options_of(case: Case) -> tuple[str | None, SamplingOptions]:
    """The method and options of an export that can draw a case."""
    if case.recipe:
        return None, SamplingOptions(recipe=case.recipe)
    guidance = float(case.call["guidance_scale"])
    return "faster", SamplingOptions(steps=case.steps, key_steps="uniform:1", guidance=guidance)


def example_picture(side_px: int, *, masked: bool) -> SourcePicture:
    """Stripes that no axis or channel leaves as they are; the mask's sides are those of latents."""
    y, x = np.mgrid[0:side_px, 0:side_px]
    stripes = np.stack([x * 255 // side_px, y * 255 // side_px, (x + y) % 16 * 15], axis=-1)
    mask = np.zeros((side_px, side_px), np.uint8)
    mask[8 : side_px // 2, : side_px // 2] = 255
    size = (side_px, side_px)
    return source_picture(stripes.astype(np.uint8), size, mask if masked else None)


def expected_latents(case: Case, folder: Path, source: SourcePicture) -> Array:
    """What diffusers' own pipeline draws, (4, H, W)."""
    plain, *edits = _PIPELINES[case.shape == "SDXL"]
    kind = LatentConsistencyModelImg2ImgPipeline if case.recipe == "lcm" else edits[case.masked]
    more: dict[str, Any] = {} if case.shape == "SDXL" else {"requires_safety_checker": False}
    with quiet_libraries():
        # Not from_pretrained: of inpainting it reads diffusers' version, which folders need not
        # tell.
        parts = plain.from_pretrained(folder).components
        pipe = kind(**parts, **more)
        pipe.set_progress_bar_config(disable=True)
        # Faster Diffusion keeps the checkpoint's timesteps; few-step students have them trailing.
        spacing = {"timestep_spacing": "trailing"} if case.recipe else {}
        pipe.scheduler = case.scheduler.from_config(pipe.scheduler.config, **spacing)
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        with torch.no_grad():
            mean = vae.encode(torch.from_numpy(source.pixels[None])).latent_dist.mode()
        latents = mean * vae.config.scaling_factor
        call = dict(case.call)
        if source.mask is not None:
            call["mask_image"] = Image.fromarray(source.mask)
            call["masked_image_latents"] = torch.zeros_like(latents)  # of UNets with 9 channels
            call["height"], call["width"] = source.mask.shape
        drawn = pipe(
            PROMPT,
            image=latents,
            strength=case.strength,
            num_inference_steps=case.steps,
            generator=torch.Generator().manual_seed(_GENERATOR),
            output_type="latent",
            **call,
        )
    value: Array = drawn.images[0].numpy()
    return value


def drawn_latents(case: Case, pipeline: Pipeline, source: SourcePicture) -> tuple[Array, int]:
    """What a bundle draws by the noises that diffusers drew, (4, H, W), and in how many steps."""
    started = pipeline.starting_at(source, strength=case.strength, steps=case.steps)
    plan, shape = started.bundle.manifest.plan, started.bundle.manifest.latent_shape
    generator = torch.Generator().manual_seed(_GENERATOR)
    one = (1, *(int(side) for side in shape[1:]))
    noises = torch.cat([torch.randn(one, generator=generator) for _ in range(plan.noises)])
    return started(PROMPT, latents=noises.numpy()).pictures[0].latents, plan.rows


def measured(chosen: list[Case], tell: Callable[[str], None]) -> Iterator[Row]:
    """All cases in turn, a bundle for each."""
    with temporary_folder() as work:
        for number, case in enumerate(chosen):
            name = case.recipe or "faster"
            tell(f"{number + 1} of {len(chosen)}: {name}, {case.kind}, strength {case.strength:g}")
            folder = small_model(case.shape, work / "models")
            method, options = options_of(case)
            student = load_for_method(CheckpointRequest(str(folder)), method, options)
            graphs = ExportOptions(with_vae_encoder=True)
            bundle = compile_openvino(export_onnx(student, work / "bundle", graphs, force=True))
            source = example_picture(bundle.manifest.width_px, masked=case.masked)
            expected, values, done = expected_latents(case, folder, source), {}, 0
            for runtime, precision in (("ort", "auto"), ("openvino", "fp32")):
                with Pipeline.open(bundle, runtime, RuntimeOptions(precision=precision)) as drawer:
                    value, done = drawn_latents(case, drawer, source)
                values[runtime] = round(psnr_db(expected, value), 1)
            yield Row(name, case.shape, case.kind, case.steps, case.strength, done, values)


def table(rows: list[Row]) -> Table:
    """One line a case, one column a runtime."""
    shown = Table("recipe", "UNet", "as", "strength", "steps done", *rows[0].psnr_db)
    for row in rows:
        values = (f"{value:.0f}" for value in row.psnr_db.values())
        steps = f"{row.done} of {row.steps}"
        shown.add_row(row.recipe, row.shape, row.kind, f"{row.strength:g}", steps, *values)
    return shown


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    console = Console(stderr=True)

    def run() -> None:
        rows = list(measured(cases(), console.print))
        Console().print(table(rows))
        if arguments.out is not None:
            text = json.dumps([asdict(row) for row in rows], indent=1)
            arguments.out.write_text(text + "\n", "utf-8")

    run_explained(run)


if __name__ == "__main__":
    main()
