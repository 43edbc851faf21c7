"""What the user chose for the graphs: precision, size, batch, hoisting, merging, tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.half_range import WHOLE_GRAPH, Float32Parts
from tiue_export.sampling.fan_out import FanOut
from tiue_export.specs import SUBPIXEL, UPSAMPLINGS, VAE_GRAPHS

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
VAE_PRECISIONS = ("auto", "fp16", "fp32", "bf16")
DTYPES = {**PRECISIONS, "bf16": torch.bfloat16}
HOISTS = ("decoder", "encoder", "none")


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose. `height` and `width` in pixels, None for the model's own size.

    `hoist` says which graph computes the decoder's time-independent part, or "none" for the naive
    decoder. `upsampling` is the form of a doubling and the convolution behind it: the model's own,
    or that of `graphs/upsampling.py`. `fan_out` is where rows part, None for where the student's
    own do. `batch` is the static batch, or the example batch when `dynamic_batch`.
    `vae_precision` "auto" is `precision`;
    `float32` names what a half-precision graph computes in float32, as an overflow audit finds it.
    `vae_tile`: the side in pixels of what the VAE decoder's graph draws at once, None for the whole
    picture. `max_prompt_tokens`: a multiple of the 75 that the text encoder reads at once, None for
    those. `with_vae_encoder`: a graph more, so that drawing may start from a picture.
    """

    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    batch: int = 1
    dynamic_batch: bool = False
    hoist: str = "decoder"
    upsampling: str = SUBPIXEL
    merge_below: float = 0.0
    fan_out: FanOut | None = None
    vae_precision: str = "auto"
    float32: Float32Parts = field(default_factory=Float32Parts)
    vae_tile: int | None = None
    max_prompt_tokens: int | None = None
    with_vae_encoder: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.hoist not in HOISTS:
            raise unknown_name("hoisting", self.hoist, HOISTS)
        if self.upsampling not in UPSAMPLINGS:
            raise unknown_name("upsampling", self.upsampling, UPSAMPLINGS)
        if self.vae_precision not in VAE_PRECISIONS:
            raise unknown_name("VAE precision", self.vae_precision, VAE_PRECISIONS)
        if self.batch < 1:
            raise UsageError(f"--batch is {self.batch}; expected 1 or more")
        if not 0 <= self.merge_below < math.inf:
            raise UsageError(
                f"--merge-below is {self.merge_below}; expected 0 or more (0.02 is usual)"
            )

    @property
    def features(self) -> frozenset[str]:
        """Which features of `registry/support.py` a bundle of these options has."""
        present = {
            "dynamic-batch": self.dynamic_batch,
            "merged": self.merge_below > 0,
            "fan-out": bool(self.fan_out),
            "naive": self.hoist == "none",
            "hoisted-into-encoder": self.hoist == "encoder",
            "tiles": self.vae_tile is not None,
            "bf16": self.vae_precision == "bf16",
            "vae-encoder": self.with_vae_encoder,
            "long-prompts": (self.max_prompt_tokens or 0) > 75,
        }
        return frozenset(name for name, asked in present.items() if asked)

    @property
    def example_batch(self) -> int:
        """Images in the example inputs: torch.export takes a 1 for a constant."""
        return max(2, self.batch) if self.dynamic_batch else self.batch

    def precision_of(self, graph: str) -> str:
        """The precision that one graph computes in: fp32, fp16 (with islands) or bf16."""
        if graph in VAE_GRAPHS and self.vae_precision != "auto":
            return self.vae_precision
        if WHOLE_GRAPH in self.float32.of(graph):
            return "fp32"
        return self.precision

    def carried_in(self, tensor: str) -> torch.dtype:
        """The dtype in which a text embedding or an encoder feature travels between graphs."""
        return torch.float32 if tensor in self.float32.tensors else PRECISIONS[self.precision]
