"""A bundle's own model, for backends that read no ONNX: from the checkpoint it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.bundle.manifest import Manifest
from tiue_export.checkpoint.lora_file import lora_from
from tiue_export.errors import CheckpointError
from tiue_export.graphs.build import ExportOptions
from tiue_export.specs import TEXT_ENCODER, VAE_DECODER
from tiue_export.student.load import load_student
from tiue_export.student.lora import merge_lora
from tiue_export.student.model import Student

Size = tuple[int, int]


@dataclass(frozen=True)
class StudentPlace:
    """Where the checkpoint of a bundle is: as `--ckpt`, `--base`, `--vae` and `--lora` say."""

    ckpt: str
    base: str | None = None
    vae: str | None = None
    lora: tuple[str, ...] = ()


def open_student(place: StudentPlace, manifest: Manifest, graph: str | None = None) -> Student:
    """The bundle's own model, with the parts that `graph` needs (None: all), adapters merged.

    A student, or what the bundle's plan draws with in a loop (Faster Diffusion).

    Raises `CheckpointError` when its weights are not those that the bundle was made from, and when
    it lacks the part of a graph.
    """
    student = load_student(
        place.ckpt,
        place.base,
        family=None if manifest.source.family == "custom" else manifest.source.family,
        steps=manifest.schedule.steps,
        allow_other_steps=True,
        # An adapter may want to be merged into all of them.
        without=() if place.lora else _unneeded(manifest, graph),
        vae=place.vae if graph in (None, VAE_DECODER) else None,
        distilled=manifest.faster is None,
    )
    for text in place.lora:
        student = merge_lora(student, *lora_from(text))
    ours = {"unet": student.source.sha256, **student.source.part_sha256}
    theirs = {"unet": manifest.source.sha256, **manifest.source.part_sha256}
    for part, found in ours.items():
        if found != theirs.get(part):
            raise CheckpointError(
                f"{place.ckpt} is not the student of this bundle: the SHA-256 of its {part} is "
                f"{found[:12]}..., the bundle's {str(theirs.get(part))[:12]}...",
                f"Give the checkpoint named {manifest.source.name} (and --lora as at the export), "
                "or export this one.",
            )
    for name, part, model in (
        (TEXT_ENCODER, "text encoder", student.text_encoder),
        (VAE_DECODER, "VAE", student.vae),
    ):
        if model is None and name in manifest.graphs and graph in (None, name):
            raise CheckpointError(
                f"{place.ckpt} has no {part}; the bundle's {name} came from elsewhere",
                "Give --base (or --vae) as when the bundle was exported.",
            )
    student.schedule, student.plan = manifest.schedule, manifest.faster
    return student


def _unneeded(manifest: Manifest, graph: str | None) -> tuple[str, ...]:
    """Parts that need not be read, as long as sizes do not depend on them."""
    if graph is None or manifest.vae_scale != 8 or manifest.text_shape[1] != 77:
        return ()
    parts = {"text_encoder": TEXT_ENCODER, "vae": VAE_DECODER}
    return tuple(part for part, needed_by in parts.items() if needed_by != graph)


def fp32_options(manifest: Manifest, size: Size) -> ExportOptions:
    """The bundle's graphs in float32 at one size (height, width in px); the batch is static."""
    return ExportOptions(
        precision="fp32",
        height=size[0],
        width=size[1],
        batch=manifest.batch or 1,
        hoist=manifest.hoisted,
    )
