"""Student or teacher with LoRA adapters merged into its weights, before anything is exported."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiue_export.bundle.manifest import Source
from tiue_export.bundle.read import file_record
from tiue_export.checkpoint.ldm_names import ldm_module_names, ldm_name
from tiue_export.checkpoint.lora_file import TEXT, TEXT_2, UNET, Adapter, read_adapters
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.student.model import Student
from tiue_export.student.paired_text_encoder import PairedTextEncoder

_LISTED = 3
_NOTE = re.compile(r"LoRA (.+) merged at scale (\S+)")


@torch.no_grad()
def merge_lora(student: Student, path: Path, scale: float = 1.0) -> Student:
    """Add `scale` times every adapter of `path` to the weights; returns the same student, changed.

    Sums are made in float32 and stored in the layer's dtype. The source's hash changes with it, and
    a note says what was merged. Raises `UnsupportedModelError` when the file is of another family.
    """
    adapters = read_adapters(path)
    layers = {UNET: _layers(student.unet) | _ldm_layers(student.unet)}
    encoder = student.text_encoder
    if isinstance(encoder, PairedTextEncoder):
        layers |= {TEXT: _layers(encoder.first), TEXT_2: _layers(encoder.second)}
    elif encoder is not None:
        layers[TEXT] = _layers(encoder)
    _check_fits(path, adapters, layers)
    for adapter in adapters:
        layer = layers[adapter.part][adapter.layer]
        weight = layer.weight
        merged = weight.float() + scale * adapter.delta().view(weight.shape)
        layer.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
    digested = f"{student.source.sha256} {file_record(path).sha256} {scale!r}"
    student.source = replace(
        student.source,
        sha256=hashlib.sha256(digested.encode()).hexdigest(),
        notes=(*student.source.notes, f"LoRA {path.name} merged at scale {scale:g}"),
    )
    return student


def lora_options(source: Source) -> tuple[str, ...]:
    """What was merged into a model, in order, as one types it: "--lora style.safetensors:0.5"."""
    merged = (_NOTE.fullmatch(note) for note in source.notes)
    return tuple(f"--lora {shlex.quote(f'{note[1]}:{note[2]}')}" for note in merged if note)


def _layers(model: nn.Module) -> dict[str, Any]:
    """Every layer that an adapter can sit on, by its path with underscores."""
    return {
        name.removeprefix("text_model.").replace(".", "_"): module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def _ldm_layers(unet: Any) -> dict[str, Any]:
    """The same layers under the names of original checkpoints, as some trainers write them."""
    modules = ldm_module_names(dict(unet.config))
    return {
        place.replace(".", "_"): module
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (place := ldm_name(name, modules))
    }


def _check_fits(path: Path, adapters: list[Adapter], layers: dict[str, dict[str, Any]]) -> None:
    """Refuse a file whole when any of its adapters has no layer here or another shape."""
    if TEXT not in layers and any(adapter.part == TEXT for adapter in adapters):
        raise UsageError(
            f"{path} changes the text encoder too, and the checkpoint has none",
            "Pass --base with the pipeline folder that has it.",
        )
    if TEXT_2 not in layers and any(adapter.part == TEXT_2 for adapter in adapters):
        raise UnsupportedModelError(
            f"{path} is a LoRA of SDXL, which has two text encoders; this model has one",
            "Give a LoRA that was trained on this model's own family.",
        )
    absent = [a for a in adapters if a.layer not in layers[a.part]]
    if absent:
        names = ", ".join(adapter.layer for adapter in absent[:_LISTED])
        raise UnsupportedModelError(
            f"{path} is of another family: {len(absent)} of its {len(adapters)} layers are not in "
            f"this model, such as {names}",
            "Give a LoRA that was trained on this model's own family.",
        )
    for adapter in adapters:
        weight = layers[adapter.part][adapter.layer].weight
        shape = (len(adapter.up), *adapter.down.shape[1:])
        if torch.Size(shape).numel() != weight.numel() or shape[:2] != tuple(weight.shape[:2]):
            raise UnsupportedModelError(
                f"{path} is of another family: its {adapter.layer} is {_shape(shape)}, this "
                f"model's {_shape(tuple(weight.shape))}{_widths(adapter, weight)}",
                "Stable Diffusion 1.x, 2.x and XL do not share LoRAs: give one of this family.",
            )


def _widths(adapter: Adapter, weight: torch.Tensor) -> str:
    """What a text layer's width says of the families, where it does."""
    known = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
    if "attn2_to_k" not in adapter.layer and "attn2_to_v" not in adapter.layer:
        return ""
    its, ours = (known.get(int(w.shape[1])) for w in (adapter.down, weight))
    return "" if None in (its, ours) else f" ({its} against {ours})"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
