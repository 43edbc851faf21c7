"""A bundle's own model, for backends that read no ONNX: from the checkpoint it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import vae_tile_px
from tiue_export.checkpoint.lora_file import lora_from
from tiue_export.errors import CheckpointError
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.faster import with_controlnet
from tiue_export.specs import CONTROLNET, TEXT_ENCODER, VAE_DECODER
from tiue_export.student.load import load_model
from tiue_export.student.lora import lora_options, merge_lora
from tiue_export.student.model import Student

Size = tuple[int, int]


@dataclass(frozen=True)
class StudentPlace:
    """Where the checkpoint of a bundle is: as `--ckpt`, `--base`, `--vae`, `--lora` and
    `--controlnet` say.
    """

    ckpt: str
    base: str | None = None
    vae: str | None = None
    lora: tuple[str, ...] = ()
    controlnet: str | None = None


def open_student(place: StudentPlace, manifest: Manifest, graph: str | None = None) -> Student:
    """The bundle's own model, with the parts that `graph` needs (None: all), adapters merged.

    A student, or what the bundle's plan draws with in a loop (Faster Diffusion).

    Raises `CheckpointError` when its weights are not those that the bundle was made from, and when
    it lacks the part of a graph.
    """
    student = load_model(
        place.ckpt,
        place.base,
        lambda checkpoint: manifest.plan,
        family=None if manifest.source.family == "custom" else manifest.source.family,
        # An adapter may want to be merged into all of them.
        without=() if place.lora else _unneeded(manifest, graph),
        vae=place.vae if graph in (None, VAE_DECODER) else None,
    )
    for text in place.lora:
        student = merge_lora(student, *lora_from(text))
    if place.controlnet is not None:
        student = with_controlnet(student, Path(place.controlnet))
    _check_same(student, place, manifest)
    for name, part, model in (
        (TEXT_ENCODER, "text encoder", student.text_encoder),
        (VAE_DECODER, "VAE", student.vae),
    ):
        if model is None and name in manifest.graphs and graph in (None, name):
            raise CheckpointError(
                f"{place.ckpt} has no {part}; the bundle's {name} came from elsewhere",
                "Give --base (or --vae) as when the bundle was exported.",
            )
    return student


def _check_same(student: Student, place: StudentPlace, manifest: Manifest) -> None:
    """Refuse other weights than the bundle's, with what the export merged or added."""
    given = {"unet": student.source.sha256, **student.source.part_sha256}
    own = {"unet": manifest.source.sha256, **manifest.source.part_sha256}
    for part, digest in given.items():
        if digest != own.get(part):
            raise CheckpointError(
                f"{place.ckpt} is not the student of this bundle: the SHA-256 of its {part} is "
                f"{digest[:12]}..., the bundle's {str(own.get(part))[:12]}...",
                _as_exported(manifest),
            )
    if CONTROLNET in manifest.graphs and student.controlnet is None:
        raise CheckpointError(
            f"{place.ckpt} comes without the ControlNet of this bundle",
            f"Add the one of the export: {manifest.source.parts.get('controlnet', '--controlnet')}",
        )


def _as_exported(manifest: Manifest) -> str:
    source = manifest.source
    controlnet = source.parts.get("controlnet")
    more = [*lora_options(source), *([controlnet] if controlnet else [])]
    return (
        f"Give the checkpoint named {source.name}"
        + (f" with {' '.join(more)} as at the export" if more else "")
        + ", or export this one."
    )


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
        vae_tile=vae_tile_px(manifest),
    )
