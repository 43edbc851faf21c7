"""How a checkpoint becomes graphs, and how they are proven: the same in every export command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiue_export.errors import UsageError
from tiue_export.sampling.fan_out import FanOut

from .checkpoint import FamilyOptions, MethodOptions, PartOptions
from .group import OptionGroup, option, picked, refuse
from .output import BundleOutput

if TYPE_CHECKING:
    from tiue_export.methods.load import CheckpointRequest


_FAN_OUT_TARGET_DB = 35.0


@dataclass(frozen=True)
class SizeOptions(OptionGroup):
    """The picture's size."""

    panel = "Graphs"
    height: int | None = option(None, "Pixels \\[default: the model's].")
    width: int | None = option(None, "Pixels \\[default: the model's].")


@dataclass(frozen=True)
class BatchOptions(OptionGroup):
    """How many pictures the graphs draw at once."""

    panel = "Graphs"
    batch: str | None = option(None, "Images per run \\[default: 1].")
    dynamic_batch: bool = option(False, "Leave the batch axis open.")

    def batch_profile(self) -> tuple[int, int, int] | None:
        """ "2" -> (2, 2, 2); "1:2:4" -> (1, 2, 4): smallest, usual and largest batch."""
        if self.batch is None:
            return None
        parts = self.batch.split(":")
        if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
            raise UsageError(
                f"--batch is {self.batch!r}; expected one number, or min:opt:max",
                "Write --batch 1, or for TensorRT engines --batch 1:2:4.",
            )
        numbers = [int(part) for part in parts]
        smallest, usual, largest = numbers * 3 if len(numbers) == 1 else numbers
        return smallest, usual, largest

    def graph_batch(self) -> tuple[int, bool]:
        """The batch that graphs are exported with, and whether its axis is left open."""
        smallest, _, largest = self.batch_profile() or (1, 1, 1)
        return smallest, self.dynamic_batch or smallest != largest

    def check_one_batch(self) -> None:
        """Refuse a range where no engine is built for one."""
        if self.batch is not None and ":" in self.batch:
            raise UsageError(
                f"--batch {self.batch} is a range, which is for TensorRT engines; graphs take one "
                "batch, or any",
                "Write --batch N, or --dynamic-batch.",
            )


@dataclass(frozen=True)
class EngineBatchOptions(BatchOptions):
    """The same for engines, which are built for a range of batches."""

    batch: str | None = option(None, "Images per run: 1, or min:opt:max such as 1:2:4.")


@dataclass(frozen=True)
class HoistOptions(OptionGroup):
    """Where the part of the decoder is computed that is the same at every timestep."""

    panel = "Graphs"
    hoist_into: str | None = option(
        None, "Graph for the time-independent part: decoder, encoder \\[default: decoder]."
    )
    no_hoist: bool = option(False, "Naive batched decoder, for comparison.")

    @property
    def hoist(self) -> str:
        """ "decoder", "encoder" or "none"; both options at once are refused."""
        if self.no_hoist and self.hoist_into is not None:
            raise UsageError(
                "--no-hoist and --hoist-into were both given", "Leave one of them out."
            )
        return "none" if self.no_hoist else self.hoist_into or "decoder"


@dataclass(frozen=True)
class GraphOptions(OptionGroup):
    """What else changes the graphs."""

    panel = "Graphs"
    upsampling: str | None = option(
        None, "subpixel: four small convolutions; nearest: as the model \\[default: subpixel]."
    )
    merge_below: float | None = option(None, "Merge decoder rows weighing less (try 0.02).")
    fan_out: str | None = option(
        None,
        "Up blocks that run once for all rows: 2, or 1.2 (and two resnets); auto:35, as many as "
        "keep the latents at 35 dB, measured first.",
    )
    fan_out_curve: Path | None = option(None, "auto: write what was measured, .png or .json.")
    vae_precision: str | None = option(
        None,
        "fp16, fp32 or bf16 \\[default: as the other graphs, by the audit; of SDXL in fp16: fp32, "
        "unless it is the VAE's fp16 fix].",
    )
    vae_tile: int | None = option(None, "Decode in tiles of so many pixels, for less memory.")
    with_vae_encoder: bool = option(
        False, "A graph more: generate --image and --mask start from a picture."
    )
    max_prompt_tokens: int | None = option(
        None, "Take longer prompts: 150, 225 ... tokens \\[default: 75]."
    )

    @property
    def fan_out_target_db(self) -> float | None:
        """What `--fan-out auto` must keep of the latents; None where the place was given."""
        word, colon, number = (self.fan_out or "").partition(":")
        if word != "auto":
            return None
        try:
            target_db = float(number) if colon else _FAN_OUT_TARGET_DB
        except ValueError:
            target_db = math.nan
        if not math.isfinite(target_db):
            raise UsageError(
                f"--fan-out is {self.fan_out}; expected auto, or auto:35 for latents at 35 dB"
            )
        return target_db

    def given_fan_out(self) -> FanOut | None:
        """Where rows part as it was typed; None for the student's own place, and for auto."""
        if self.fan_out_target_db is not None:
            return None
        refuse(
            "for --fan-out auto, which measures it",
            "Add --fan-out auto, or leave it out.",
            self,
            only=("fan_out_curve",),
        )
        return None if self.fan_out is None else FanOut.parse(self.fan_out)


@dataclass(frozen=True)
class AuditOptions(OptionGroup):
    """The search for values that half precision cannot hold."""

    panel = "Proof"
    no_audit: bool = option(False, "fp16 without looking for overflow first.")
    audit_prompts: Path | None = option(None, "More prompts to audit on: text file, one a line.")

    def check_audit(self, precision: str) -> None:
        """Refuse them for graphs that nothing is audited in, and prompts of no audit."""
        if self.no_audit and self.audit_prompts is not None:
            raise UsageError(
                "--no-audit and --audit-prompts were both given", "Leave one of them out."
            )
        if precision != "fp16":
            refuse(
                f"for graphs in half precision; the ONNX graphs made here are {precision}",
                "Leave it out, or export in half precision: tiue-export onnx --ckpt STUDENT "
                "--precision fp16 --out BUNDLE",
                self,
                only=("no_audit", "audit_prompts"),
            )


@dataclass(frozen=True)
class ParityOptions(OptionGroup):
    """Whether a failed gate ends the command."""

    panel = "Proof"
    allow_parity_loss: bool = option(False, "Keep what fails a gate; it is recorded.")


@dataclass(frozen=True)
class ExportRequest(
    BundleOutput,
    ParityOptions,
    AuditOptions,
    GraphOptions,
    HoistOptions,
    BatchOptions,
    SizeOptions,
    MethodOptions,
    FamilyOptions,
    PartOptions,
):
    """What decides an export, beside the checkpoint itself: the same for every backend."""

    def checkpoint(self, ckpt: str) -> CheckpointRequest:
        """The checkpoint with all that is loaded, replaced or merged."""
        from tiue_export.methods.load import CheckpointRequest

        return picked(CheckpointRequest, self, ckpt=ckpt)
