"""What SDXL's UNets are told beside the timestep, carried in the text embedding's last row.

Such a UNet adds to its time embedding an embedding of the pooled text (B, P) and of six numbers:
the picture's original size, where it was cut, its size (Podell et al. 2023, arXiv 2307.01952,
section 2.2; diffusers' UNet2DConditionModel, addition_embed_type "text_time"). Of a bundle and of a
student they are the size that is drawn, uncut.

Text is one value everywhere: (B, L, D) for Stable Diffusion 1.x and 2.x. For SDXL it is
(B, L + 1, D), whose last row holds the pooled text and zeros (P is at most D). So plans, chains,
runtimes, training and benchmarks know nothing of it; UNets take the row off.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiue_export.checkpoint.family import pooled_width

# Rows of a text embedding that are no tokens, where the UNet has added conditions.
POOLED_ROWS = 1


def pooled_rows(unet: Any) -> int:
    """How many rows of its text embeddings are no tokens: 1 or 0."""
    return POOLED_ROWS if pooled_width(unet.config) else 0


def joined_text(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Tokens (B, L, D) and pooled text (B, P) -> text (B, L + 1, D)."""
    row = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
    return torch.cat([tokens, row.unsqueeze(1)], 1)


def token_text(unet: Any, text: Tensor) -> Tensor:
    """The tokens of a text embedding, (B, L, D): what attentions read."""
    return text[:, :-POOLED_ROWS] if pooled_rows(unet) else text


def size_conditions(size_px: tuple[int, int]) -> list[int]:
    """The six numbers of a picture drawn at this size (height, width) and not cut."""
    return [*size_px, 0, 0, *size_px]


def added_embedding(unet: Any, text: Tensor, size_px: tuple[int, int]) -> Tensor | None:
    """What is added to the time embedding, (B, D_t); None for a UNet without such conditions."""
    width = pooled_width(unet.config)
    if not width:
        return None
    sizes = torch.tensor(size_conditions(size_px), device=text.device)
    projected = unet.add_time_proj(sizes).flatten().to(text.dtype)  # (6 * addition_time_embed_dim)
    pooled = text[:, -1, :width]
    embedded: Tensor = unet.add_embedding(torch.cat([pooled, projected.expand(len(text), -1)], 1))
    return embedded


def with_joined_text(unet: Any, px_per_latent: int) -> Any:
    """Let a UNet with added conditions take joined text where it takes text; returns it.

    `unet(sample, timestep, text)` is then what it is for every other model.
    """
    if pooled_width(unet.config) and not getattr(unet, "takes_joined_text", False):
        hook = functools.partial(_unjoined, px_per_latent=px_per_latent)
        unet.register_forward_pre_hook(hook, with_kwargs=True)
        unet.takes_joined_text = True
    return unet


def _unjoined(
    unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], px_per_latent: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
    text, sample = named["encoder_hidden_states"], named["sample"]
    size_px = px_per_latent * sample.shape[-2], px_per_latent * sample.shape[-1]
    sizes = torch.tensor([size_conditions(size_px)], device=text.device).expand(len(text), -1)
    named["encoder_hidden_states"] = text[:, :-POOLED_ROWS]
    named["added_cond_kwargs"] = {
        "text_embeds": text[:, -1, : pooled_width(unet.config)],
        "time_ids": sizes,
    }
    return (), named
