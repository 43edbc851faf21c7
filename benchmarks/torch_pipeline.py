"""A diffusers pipeline folder in PyTorch: prompts to embeddings, noise to latents by DDIM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.student.model import Student


@dataclass(frozen=True)
class TorchPipeline:
    """A checkpoint's modules in float32 on one device, text encoder included."""

    student: Student
    tokenizer: Tokenizer

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text embedding (B, L, D)."""
        text_encoder: Any = self.student.text_encoder
        ids = torch.from_numpy(self.tokenizer(prompts)).to(text_encoder.device)
        embedded: Tensor = text_encoder(ids).last_hidden_state
        return embedded

    @torch.no_grad()
    def sample(
        self,
        scheduler: Any,
        noise: Tensor,
        text: Tensor,
        guidance: float = 1.0,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Noise (B, 4, H, W) -> latents, step by step over the timesteps of a DDIM scheduler.

        `text` is (B, L, D), or (2*B, L, D) with the null prompt's rows first, for `guidance`.
        """
        latents = noise
        for timestep in scheduler.timesteps:
            copies = latents.repeat(len(text) // len(noise), 1, 1, 1)
            output = self.student.unet(copies, timestep, text).sample.float()
            if len(text) > len(noise):
                null, conditioned = output.chunk(2)
                output = null + guidance * (conditioned - null)
            latents = scheduler.step(output, timestep, latents).prev_sample
            on_step()
        return latents
