"""What to export, and which sampler it is for: groups of every command that reads a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .group import OptionGroup

if TYPE_CHECKING:
    from tiue_export.methods.method import MethodOptions as Sampling


@dataclass(frozen=True)
class CheckpointOptions(OptionGroup):
    """The checkpoint itself."""

    panel = "Checkpoint"
    ckpt: Annotated[
        str,
        typer.Option(
            "--ckpt",
            help='Student: .safetensors file, diffusers folder, hub id; "demo": the one that '
            "ships.",
        ),
    ]


@dataclass(frozen=True)
class SourceOptions(OptionGroup):
    """What a compiled form is made of: a checkpoint to export first, or a bundle that is there."""

    panel = "Checkpoint"
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student to export first; or give --bundle.")
    ] = None
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle to add to; its graphs are kept.")
    ] = None


@dataclass(frozen=True)
class StudentSourceOptions(SourceOptions):
    """The same where a backend reads no ONNX: the checkpoint is needed with a bundle too."""

    ckpt: Annotated[
        str | None, typer.Option("--ckpt", help="Student; needed with --bundle too.")
    ] = None
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Bundle of it \\[default: one is exported].")
    ] = None


@dataclass(frozen=True)
class PartOptions(OptionGroup):
    """The parts of the model that the checkpoint does not bring."""

    panel = "Checkpoint"
    base: Annotated[
        str | None,
        typer.Option("--base", help="Pipeline folder or hub id for what the checkpoint lacks."),
    ] = None
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae", help="Folder of another VAE, such as TAESD; tiny:FOLDER insists on one."
        ),
    ] = None


@dataclass(frozen=True)
class FamilyOptions(OptionGroup):
    """What the weights cannot tell."""

    panel = "Checkpoint"
    family: Annotated[
        str | None,
        typer.Option("--family", help="sd15, sd21-base, sd21-v, tiny \\[default: recognised]."),
    ] = None


@dataclass(frozen=True)
class LoraOptions(OptionGroup):
    """What is merged into the model."""

    panel = "Checkpoint"
    lora: Annotated[
        tuple[str, ...],
        typer.Option("--lora", help="FILE[:SCALE] to merge first, diffusers or kohya; repeatable."),
    ] = ()


@dataclass(frozen=True)
class ControlNetOptions(OptionGroup):
    """What is put beside the model."""

    panel = "Checkpoint"
    controlnet: Annotated[
        str | None,
        typer.Option("--controlnet", help="faster: diffusers folder of a ControlNet to steer by."),
    ] = None


@dataclass(frozen=True)
class StepOptions(OptionGroup):
    """Steps of the sampler: a student's K, or those of a loop."""

    panel = "Method"
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", help="K \\[default: as recorded, else 4]; faster: the sampler's \\[50]."
        ),
    ] = None
    allow_other_steps: Annotated[
        bool, typer.Option("--allow-other-steps", help="Take a K it was not trained for.")
    ] = False


@dataclass(frozen=True)
class SamplerOptions(OptionGroup):
    """The sampler of a model in a loop."""

    panel = "Method"
    scheduler: Annotated[
        str | None,
        typer.Option("--scheduler", help="faster: ddim, dpmpp or pndm \\[default: ddim]."),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", help="faster: scale, 1 is none \\[default: 7.5]."),
    ] = None


@dataclass(frozen=True)
class LoopOptions(SamplerOptions):
    """What only a model in a loop (Faster Diffusion) has."""

    panel = "Method"
    key_steps: Annotated[
        str | None,
        typer.Option(
            "--key-steps",
            help="faster: steps that run the encoder: nonuniform, uniform:N, 0,1,2,... or auto.",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="auto: share of plain sampling's operations, such as 0.7."),
    ] = None
    inject: Annotated[
        str | None,
        typer.Option(
            "--inject", help="faster: prior noise: off, on, parallel, sequential \\[default: on]."
        ),
    ] = None
    max_decoder_rows: Annotated[
        int | None,
        typer.Option("--max-decoder-rows", help="faster: rows of one decoder run; less memory."),
    ] = None


@dataclass(frozen=True)
class MethodName(OptionGroup):
    """The method by its name."""

    panel = "Method"
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="tiue: a distilled student; faster: any SD 1.x/2.x, Faster Diffusion "
            "\\[default: tiue].",
        ),
    ] = None


@dataclass(frozen=True)
class MethodOptions(LoopOptions, StepOptions, MethodName, ControlNetOptions, LoraOptions):
    """What is exported: a distilled student, or a model in a loop."""

    def sampling(self) -> Sampling:
        """What was said of the sampling, in the words of methods."""
        from tiue_export.methods.method import MethodOptions as Sampling

        names = (field.name for field in dataclasses.fields(Sampling))
        return Sampling(**{name: getattr(self, name) for name in names})

    def plans_passes(self) -> bool:
        """Whether the method draws in several passes; unknown methods are refused."""
        from tiue_export.methods.load import DEFAULT_METHOD, METHODS
        from tiue_export.methods.method import method_named

        return "passes" in method_named(self.method or DEFAULT_METHOD, METHODS).features
