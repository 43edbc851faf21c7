"""A bundle's own model, for backends that read no ONNX: from the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Callable

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import vae_tile_px
from tiue_export.errors import CheckpointError
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest, completed
from tiue_export.specs import CONTROLNET, NEAREST, TEXT_ENCODER, VAE_DECODER, VAE_ENCODER
from tiue_export.student.embedding import embedding_options
from tiue_export.student.load import PlanChoice, load_model
from tiue_export.student.lora import lora_options
from tiue_export.student.model import Student

Size = tuple[int, int]


def open_student(
    request: CheckpointRequest,
    manifest: Manifest,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """The bundle's own model with adapters merged: a student, or a teacher that is drawn in passes.

    Its family is the bundle's. Raises what `as_exported` raises.
    """
    student = load_model(
        request.ckpt,
        request.base,
        lambda checkpoint: PlanChoice(manifest.plan),
        family=None if manifest.source.family == "custom" else manifest.source.family,
        vae=request.vae,
        on_stage=on_stage,
    )
    return as_exported(completed(student, request, on_stage), manifest, request.ckpt)


def as_exported(student: Student, manifest: Manifest, place: str | None = None) -> Student:
    """The model, loaded from `place`, with the plan that the bundle's graphs have.

    Raises `CheckpointError` when its weights are not those that the bundle was made from, and when
    it lacks the part of a graph.
    """
    place = place or student.source.name
    _check_same(student, manifest, place)
    for name, part, model in (
        (TEXT_ENCODER, "text encoder", student.text_encoder),
        (VAE_DECODER, "VAE", student.vae),
    ):
        if model is None and name in manifest.graphs:
            raise CheckpointError(
                f"{place} has no {part}; the bundle's {name} came from elsewhere",
                "Give --base (or --vae) as when the bundle was exported.",
            )
    return student.by_plan(manifest.plan)


def _check_same(student: Student, manifest: Manifest, place: str) -> None:
    """Refuse other weights than the bundle's, with what the export merged or added."""
    given = {"unet": student.source.sha256, **student.source.part_sha256}
    own = {"unet": manifest.source.sha256, **manifest.source.part_sha256}
    for part, digest in given.items():
        if digest != own.get(part):
            raise CheckpointError(
                f"{place} is not the student of this bundle: the SHA-256 of its {part} is "
                f"{digest[:12]}..., the bundle's {str(own.get(part))[:12]}...",
                _as_exported(manifest),
            )
    if CONTROLNET in manifest.graphs and student.controlnet is None:
        raise CheckpointError(
            f"{place} comes without the ControlNet of this bundle",
            f"Add the one of the export: {manifest.source.parts.get('controlnet', '--controlnet')}",
        )


def _as_exported(manifest: Manifest) -> str:
    source = manifest.source
    controlnet = source.parts.get("controlnet")
    added = (*lora_options(source), *embedding_options(source))
    more = [*added, *([controlnet] if controlnet else [])]
    return (
        f"Give the checkpoint named {source.name}"
        + (f" with {' '.join(more)} as at the export" if more else "")
        + ", or export this one."
    )


def fp32_options(manifest: Manifest, size: Size) -> ExportOptions:
    """The bundle's graphs in float32 at one size (height, width in px); the batch is static.

    They upsample as the model does: only that is known to suit Core ML's compilers.
    """
    return ExportOptions(
        precision="fp32",
        height=size[0],
        width=size[1],
        batch=manifest.batch or 1,
        hoist=manifest.hoisted,
        upsampling=NEAREST,
        vae_tile=vae_tile_px(manifest),
        with_vae_encoder=VAE_ENCODER in manifest.graphs,
        max_prompt_tokens=manifest.max_prompt_tokens,
    )
