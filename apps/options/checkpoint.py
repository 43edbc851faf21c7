"""What to export, and which sampler it is for: groups of every command that reads a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..completion import recipe_names
from .group import OptionGroup, option, picked

if TYPE_CHECKING:
    from tiue_export.methods.method import SamplingOptions


@dataclass(frozen=True)
class CheckpointOptions(OptionGroup):
    """The checkpoint itself."""

    panel = "Checkpoint"
    ckpt: str = option(
        ..., 'Student: .safetensors file, diffusers folder, hub id; "demo": the one that ships.'
    )


@dataclass(frozen=True)
class SourceOptions(OptionGroup):
    """What a compiled form is made of: a checkpoint to export first, or a bundle that is there."""

    panel = "Checkpoint"
    ckpt: str | None = option(None, "Student to export first; or give --bundle.")
    bundle: Path | None = option(None, "Bundle to add to; its graphs are kept.")


@dataclass(frozen=True)
class StudentSourceOptions(SourceOptions):
    """The same where a backend reads no ONNX: the checkpoint is needed with a bundle too."""

    ckpt: str | None = option(None, "Student; needed with --bundle too.")
    bundle: Path | None = option(None, "Bundle of it \\[default: one is exported].")


@dataclass(frozen=True)
class PartOptions(OptionGroup):
    """The parts of the model that the checkpoint does not bring."""

    panel = "Checkpoint"
    base: str | None = option(None, "Pipeline folder or hub id for what the checkpoint lacks.")
    vae: str | None = option(
        None, "Another VAE, folder or .safetensors, such as TAESD; tiny:PATH insists on one."
    )


@dataclass(frozen=True)
class FamilyOptions(OptionGroup):
    """What the weights cannot tell."""

    panel = "Checkpoint"
    family: str | None = option(None, "sd15, sd21-base, bk-sdm-tiny ... \\[default: recognised].")
    prediction: str | None = option(
        None, "What a single file's network predicts: epsilon, v_prediction or sample."
    )


@dataclass(frozen=True)
class LoraOptions(OptionGroup):
    """What is merged into the model."""

    panel = "Checkpoint"
    lora: tuple[str, ...] = option(
        (), "FILE[:SCALE] to merge first, diffusers or kohya; repeatable."
    )
    embedding: tuple[str, ...] = option(
        (), "FILE[:TOKEN] of textual inversion, or Custom Diffusion's weights; repeatable."
    )


@dataclass(frozen=True)
class ControlNetOptions(OptionGroup):
    """What is put beside the model."""

    panel = "Checkpoint"
    controlnet: str | None = option(None, "faster: diffusers folder of a ControlNet to steer by.")


@dataclass(frozen=True)
class StepOptions(OptionGroup):
    """Steps of the sampler: a student's K, or those of a loop."""

    panel = "Method"
    steps: int | None = option(
        None, "K \\[default: as recorded, else 4]; few-step: the recipe's; faster: \\[50]."
    )
    allow_other_steps: bool = option(False, "Take steps it was not trained for.")


@dataclass(frozen=True)
class SamplerOptions(OptionGroup):
    """The sampler of a model in a loop."""

    panel = "Method"
    scheduler: str | None = option(None, "faster: ddim, dpmpp or pndm \\[default: ddim].")
    guidance: float | None = option(
        None, "Scale, 1 is none; faster \\[default: 7.5]; few-step: as the recipe takes it."
    )


@dataclass(frozen=True)
class LoopOptions(SamplerOptions):
    """What only a model in a loop (Faster Diffusion) has."""

    panel = "Method"
    key_steps: str | None = option(
        None, "Steps that run the encoder: nonuniform, uniform:N, 0,2,... or (faster) auto."
    )
    budget: float | None = option(None, "auto: share of plain sampling's operations, such as 0.7.")
    inject: str | None = option(
        None, "faster: prior noise: off, on, parallel, sequential \\[default: on]."
    )
    max_decoder_rows: int | None = option(None, "Rows of one decoder run; less memory.")


@dataclass(frozen=True)
class MethodName(OptionGroup):
    """The method by its name."""

    panel = "Method"
    method: str | None = option(
        None,
        "tiue: a student in one pass; few-step: SD-Turbo, LCM, ...; faster: any SD 1.x/2.x, Faster "
        "Diffusion \\[default: as the checkpoint tells, else tiue].",
    )


@dataclass(frozen=True)
class RecipeOptions(OptionGroup):
    """Which few-step student it is."""

    panel = "Method"
    recipe: str | None = option(
        None,
        "few-step: which student it is, see `tiue-export recipes`.",
        completion=recipe_names,
    )
    eta: float | None = option(None, "few-step: share of fresh noise of a tcd recipe.")


@dataclass(frozen=True)
class MethodOptions(
    LoopOptions, StepOptions, RecipeOptions, MethodName, ControlNetOptions, LoraOptions
):
    """What is exported: a distilled student, or a model in a loop."""

    def sampling(self) -> SamplingOptions:
        """What was said of the sampling, in the words of methods."""
        from tiue_export.methods.method import SamplingOptions

        return picked(SamplingOptions, self)

    def plans_passes(self) -> bool:
        """Whether the method draws in several passes; unknown methods are refused."""
        from tiue_export.methods.load import DEFAULT_METHOD, METHODS
        from tiue_export.methods.method import method_named

        return "passes" in method_named(self.method or DEFAULT_METHOD, METHODS).features
