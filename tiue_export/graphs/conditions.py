"""What the UNet's graphs read of the text: tokens, and what SDXL adds to its time embedding.

At an exported size SDXL's size conditions are constants: their share of the first layer is folded
into its bias, in float64, and only the pooled text is left to compute with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiue_export.checkpoint.family import pooled_width
from tiue_export.graphs.lowering import copied, fold_time, is_single, time_embedding_float64
from tiue_export.sampling.plan import Timestep
from tiue_export.student.added_conditions import POOLED_ROWS, size_conditions

Size = tuple[int, int]


class TextConditions(nn.Module):
    """text -> tokens (N, L, D) and what is added to the time embedding, (N, D_t) or None.

    Text is the tokens for Stable Diffusion 1.x and 2.x, (N, L + 1, D) for SDXL
    (`student/added_conditions.py`). The embedding is computed in float32 and given in `dtype`.
    """

    def __init__(self, unet: Any, picture_px: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.pooled_width = pooled_width(unet.config)
        self.dtype = dtype
        self.first: nn.Linear | None = None
        if self.pooled_width:
            self.first = _without_size(unet, picture_px)
            self.second = copied(unet.add_embedding.linear_2, torch.float32)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.first is None:
            return text, None
        pooled = text[:, -1, : self.pooled_width].float()
        added = self.second(F.silu(self.first(pooled)))
        return text[:, :-POOLED_ROWS], added.to(self.dtype)


def _without_size(unet: Any, picture_px: Size) -> nn.Linear:
    """The first layer over the pooled text alone, in float32."""
    layer, width = unet.add_embedding.linear_1, pooled_width(unet.config)
    sizes = torch.tensor(size_conditions(picture_px), device=layer.weight.device)
    with torch.no_grad():
        weight = layer.weight.double()
        projected = unet.add_time_proj(sizes).flatten().double()
        bias = layer.bias.double() + weight[:, width:] @ projected
    with torch.device("meta"):
        first = nn.Linear(width, len(weight))
    first.weight = nn.Parameter(weight[:, :width].float(), requires_grad=False)
    first.bias = nn.Parameter(bias.float(), requires_grad=False)
    return first


class FixedTime(nn.Module):
    """tokens (B, L, D), added (B, D_t) or None -> what resnets take as time, for K*B rows.

    At fixed timesteps: their embeddings and what is added, or where nothing is, only the rows,
    which folded resnets count.
    """

    embedding: Tensor

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.register_buffer("embedding", embedding.float())  # (K, D_t)

    def forward(self, tokens: Tensor, added: Tensor | None) -> Tensor:
        steps = len(self.embedding)
        if added is not None:
            if steps == 1 or is_single(added):
                return self.embedding + added  # (B, D_t) or (K, D_t)
            return (self.embedding.unsqueeze(1) + added).flatten(0, 1)  # (K*B, D_t)
        rows = tokens[:, 0, :1]
        return rows if steps == 1 else rows.repeat(steps, 1)  # (K*B, 1)


def fixed_time(unet: Any, body: Any, timesteps: tuple[Timestep, ...]) -> tuple[Any, FixedTime]:
    """A UNet's part (changed in place) at fixed timesteps, and what its resnets then take."""
    embedding = time_embedding_float64(unet, timesteps)
    if not pooled_width(unet.config):
        body = fold_time(body, embedding)
    return body, FixedTime(embedding)
