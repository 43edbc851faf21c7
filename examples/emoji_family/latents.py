"""The teacher's data: latents of drawn pictures with their captions, kept in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiue_export.train.cpu_precision import cpu_autocast

from .corpus import Emoji
from .drawing import draw


@dataclass(frozen=True)
class LatentSet:
    """`latents` (N, 4, h, w) float16, scaled to unit variance; `captions[i]` describes latents[i].

    `scaling_factor` is what the autoencoder's latents were multiplied by.
    """

    latents: Tensor
    captions: list[str]
    scaling_factor: float


def encode_pictures(
    autoencoder: Any, corpus: tuple[Emoji, ...], file: Path, *, size: int, draws: int, seed: int
) -> LatentSet:
    """Draw every emoji `draws` times at `size` px and encode; an existing `file` is read."""
    if not file.is_file():
        latents, captions = _encode(autoencoder, corpus, size, draws, seed)
        factor = float(1 / latents.float().std())
        scaled = (latents.float() * factor).half().contiguous()
        partial = file.with_suffix(".partial")
        metadata = {"captions": json.dumps(captions), "scaling_factor": repr(factor)}
        save_file({"latents": scaled}, partial, metadata)
        partial.replace(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        return LatentSet(
            opened.get_tensor("latents"),
            json.loads(metadata["captions"]),
            float(metadata["scaling_factor"]),
        )


@torch.no_grad()
def _encode(
    autoencoder: Any, corpus: tuple[Emoji, ...], size: int, draws: int, seed: int
) -> tuple[Tensor, list[str]]:
    latents, captions = [], []
    for number in range(draws):
        for first in range(0, len(corpus), 64):
            drawn = [
                draw(emoji, np.random.default_rng([seed, 2, number, first + place]), size)
                for place, emoji in enumerate(corpus[first : first + 64])
            ]
            captions += [one.caption for one in drawn]
            pictures = torch.from_numpy(np.stack([one.picture for one in drawn]))
            pictures = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1  # (64, 3, size, size)
            with cpu_autocast():
                encoded = autoencoder.encoder(pictures.to(memory_format=torch.channels_last))
            latents.append(encoded.half())
    return torch.cat(latents), captions
