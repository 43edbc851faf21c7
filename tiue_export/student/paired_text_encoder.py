"""SDXL's two text encoders as one: tokens to joined text.

Both read the same tokens but for the padding, which each was trained with: a tokenizer of the
second would only put another id behind the end. Of each the layer before the last is read, without
the last norm; the second's whole output at the end token, projected, is the pooled text (Podell et
al. 2023, arXiv 2307.01952, section 2.1; diffusers' StableDiffusionXLPipeline.encode_prompt).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tiue_export.student.added_conditions import joined_text

_READ = -2  # of the hidden states, which begin with the embeddings


class PairedTextEncoder(nn.Module):
    """Token ids (B, L) of the first tokenizer -> an object whose `last_hidden_state` is the text.

    `first` is a transformers CLIPTextModel, `second` a CLIPTextModelWithProjection. `end_token`
    ends a prompt, `second_pad` is what the second was trained with behind it. With `zero_empty` the
    text of a prompt without a word is zeros, as SDXL was trained to be guided away from.
    """

    later: Tensor

    def __init__(
        self, first: Any, second: Any, end_token: int, second_pad: int, zero_empty: bool
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.end_token, self.second_pad, self.zero_empty = end_token, second_pad, zero_empty
        length = int(first.config.max_position_embeddings)
        # Not kept with the weights: how many of a row's tokens before each are ends, as a product.
        later = torch.ones(length, length).triu(1)
        self.register_buffer("later", later, persistent=False)

    @property
    def config(self) -> SimpleNamespace:
        """What the two have in common, and the width of the text."""
        own, other = self.first.config, self.second.config
        return SimpleNamespace(
            max_position_embeddings=own.max_position_embeddings,
            hidden_size=own.hidden_size + other.hidden_size,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.first.device
        return device

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """(B, L) int64 -> `last_hidden_state` (B, L + 1, D)."""
        ends = (input_ids == self.end_token).to(self.later.dtype)
        ends_before = ends @ self.later  # (B, L)
        ids_2 = torch.where(ends_before > 0, self.second_pad, input_ids)
        own = self.first(input_ids, output_hidden_states=True).hidden_states[_READ]
        other = self.second.text_model(ids_2, output_hidden_states=True)
        tokens = torch.cat([own, other.hidden_states[_READ]], 2)
        # The first end: CLIP takes its pooled output there.
        at_end = (ends * (ends_before == 0)).unsqueeze(2).to(other.last_hidden_state.dtype)
        pooled = self.second.text_projection((at_end * other.last_hidden_state).sum(1))
        text = joined_text(tokens, pooled)
        if self.zero_empty:
            words = (input_ids[:, 1] != self.end_token).to(text.dtype)
            text = text * words[:, None, None]
        return SimpleNamespace(last_hidden_state=text)
