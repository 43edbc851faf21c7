"""What parting late costs a student: its latents against those of rows that part where it learned.

Nothing is trained: the trunk takes the first timestep's embedding where each row had its own. So
the loss belongs to a checkpoint, and is measured on real prompts before graphs are made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tiue_export.bundle.manifest import ParityRecord
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.graphs.build import build_graphs, gaussian_text, meta_twin
from tiue_export.graphs.lowering import copied
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.fan_out_curve import FanOutCurve, FanOutPoint
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.half_range import Float32Parts
from tiue_export.proof.parity import PROMPTS, parity_record, reference_prompts
from tiue_export.reference.sharing_cost import unet_flops
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.sampler import OnStep
from tiue_export.specs import UNET_GRAPHS, Array
from tiue_export.student.model import Student, text_embedding
from tiue_export.student.up_path import places

_PICTURES = 4
_INPUTS = f"{_PICTURES} pictures of {len(PROMPTS)} real prompts, seeded noise"


def fan_out_record(
    student: Student, options: ExportOptions, tokenizer: Tokenizer | None
) -> ParityRecord:
    """The hop from rows that part where the student learned to where `options` ask."""
    place = options.fan_out or FanOut()
    own, parted = parted_latents(student, options, tokenizer, [place])
    subject = f"latents / fan-out {student.plan.fan_out}"
    return parity_record(f"fan-out {place}", subject, own, parted, "fan-out", _INPUTS)


def fan_out_curve(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    target_psnr_db: float,
    on_step: OnStep = lambda done, total: None,
) -> FanOutCurve:
    """Measure every place from the student's own on; `options` decide size and merged rows.

    Raises `UsageError` for a student that draws in several passes.
    """
    start = student.plan.parting_at(student.plan.fan_out).fan_out
    listed = [place for place in places(student.unet.up_blocks) if place >= start]
    own, *parted = parted_latents(student, options, tokenizer, listed, on_step)
    points = [
        FanOutPoint(place, _gflop(student, options, place), psnr_db(own, latents))
        for place, latents in zip(listed, parted, strict=True)
    ]
    return FanOutCurve(tuple(points), _INPUTS, target_psnr_db)


def parted_latents(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    listed: Sequence[FanOut],
    on_step: OnStep = lambda done, total: None,
) -> list[Array]:
    """Latents (pictures, 4, H, W) of the student's own rows, then of rows that part at each place.

    Computed in float32, one picture at a time; of each prompt several seeds.
    """
    options = _single(options)
    own = student.plan.merged(options.merge_below)
    plans = [own, *(replace(own, fan_out=place) for place in listed)]
    wide = student.of_parts(unet=copied(student.unet, torch.float32, plain=False))
    texts = _texts(student, options, tokenizer)
    drawings = []
    for number in range(_PICTURES):
        noise = noise_from_seed(number, shapes_of(student, options).latents)
        drawings.append(_drawn(wide, plans, noise, texts[number % len(texts)][None]))
        on_step(number + 1, _PICTURES)
    return list(np.stack(drawings, 1))


@torch.no_grad()
def _drawn(wide: Student, plans: Sequence[Plan], noise: Array, text: Tensor) -> Array:
    """Latents by each plan, (plans, 4, H, W), from one run of the encoder."""
    start = torch.from_numpy(noise)
    features = wide.encode(start, text)
    latents = []
    for plan in plans:
        parted = wide.by_plan(plan)
        latents.append(parted.combine(start, parted.decode(features, text))[0].numpy())
    return np.stack(latents)


def _texts(student: Student, options: ExportOptions, tokenizer: Tokenizer | None) -> Tensor:
    """The text embeddings of `PROMPTS`, (P, L, D) float32; Gaussian without a text encoder."""
    _, length, width = shapes_of(student, options).text
    if student.text_encoder is None or tokenizer is None:
        return torch.from_numpy(gaussian_text((len(PROMPTS), length, width)))
    encoder = copied(student.text_encoder, torch.float32, plain=False)
    with torch.no_grad():
        prompts = reference_prompts(len(PROMPTS), tokenizer.chunks)
        return text_embedding(encoder, torch.from_numpy(tokenizer(prompts)))


def _gflop(student: Student, options: ExportOptions, place: FanOut) -> float:
    """Operations of the UNet's two graphs for one picture, hoisted, counted without computing."""
    hollow = student.of_parts(unet=meta_twin(student.unet))
    parted = replace(_single(options), fan_out=place)
    return sum(unet_flops(graph) for graph in build_graphs(hollow, parted, UNET_GRAPHS)) / 1e9


def _single(options: ExportOptions) -> ExportOptions:
    """The same graphs in float32 for one picture, without what a half-precision audit keeps."""
    return replace(options, batch=1, dynamic_batch=False, precision="fp32", float32=Float32Parts())
