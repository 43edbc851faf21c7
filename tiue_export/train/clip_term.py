"""The optional CLIP term: the picture's CLIP features are pushed towards the prompt's.

Off in the paper; the released weights had it for their last 10,000 steps. The picture comes from a
small VAE decoder (TAESD), as differentiating through the full one costs more than the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

from tiue_export.checkpoint.parts import WEIGHTS_STEM, load_vae, quiet_libraries
from tiue_export.checkpoint.tensors import sha256_of_folder
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.errors import CheckpointError, first_line

from .config import DistillConfig
from .losses import clip_loss


class ClipTerm:
    """Latents (B, 4, h, w) and their prompts -> relu(threshold - mean cosine)."""

    def __init__(
        self, config: DistillConfig, clip: Any, tokenizer: Tokenizer, decoder: Any
    ) -> None:
        self._config, self._clip, self._tokenizer, self._decoder = config, clip, tokenizer, decoder

    def weight(self, step: int) -> float:
        """Falls linearly to zero over `clip_decay_steps`."""
        left = 1 - step / self._config.clip_decay_steps
        return self._config.clip_weight * max(0.0, left)

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        config = self._clip.config
        scaled = latents / self._decoder.config.scaling_factor
        pictures = self._decoder.decode(scaled, return_dict=False)[0]  # (B, 3, H, W) in [-1, 1]
        pictures = (pictures.float() / 2 + 0.5).clamp(0, 1)
        side = config.vision_config.image_size
        # The published code feeds [0, 1] pictures, without CLIP's mean and standard deviation.
        resized = functional.interpolate(pictures, (side, side), mode="bicubic")
        # No mask: CLIP's text attention is causal, so what pads the end changes nothing before it.
        ids = torch.from_numpy(self._tokenizer(prompts)).to(latents.device)  # (B, L)
        output = self._clip(input_ids=ids, pixel_values=resized)
        return clip_loss(output.image_embeds, output.text_embeds, self._config.clip_threshold)


def load_clip_term(config: DistillConfig, device: torch.device) -> ClipTerm | None:
    """The frozen models that the configuration names, or None where it names none.

    Raises `CheckpointError` or `UnsupportedModelError` for folders that do not hold them.
    """
    if config.clip_model is None or config.clip_decoder is None:
        return None
    folder = Path(config.clip_model)
    try:
        with quiet_libraries():
            clip = CLIPModel.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError and more on bad folders
        raise CheckpointError(
            f"{folder} is not a CLIPModel folder: {first_line(error)}",
            "It needs config.json, model.safetensors and the tokenizer's files.",
        ) from error
    tokenizer = tokenizer_of(folder, clip.config.text_config.max_position_embeddings)
    decoder = load_vae(Path(config.clip_decoder)).float()
    for model in (clip, decoder):
        model.to(device).requires_grad_(False).eval()
    return ClipTerm(config, clip, tokenizer, decoder)


def clip_sha256(config: DistillConfig) -> dict[str, str]:
    """SHA-256 of the weights that the term computes with; empty where there is none."""
    if config.clip_model is None or config.clip_decoder is None:
        return {}
    return {
        "clip_model": sha256_of_folder(Path(config.clip_model), "model"),
        "clip_decoder": sha256_of_folder(Path(config.clip_decoder), WEIGHTS_STEM),
    }
