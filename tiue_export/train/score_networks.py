"""Teacher and fake-score network in one UNet: the adapters switched off and on.

The teacher is frozen. The fake score ("LoRA teacher") is the same UNet with low-rank adapters; it
learns what the student draws. One copy of the base weights serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from tiue_export.errors import UsageError, first_line

from .losses import guided

ADAPTER = "fake_score"


def add_adapters(unet: Any, *, rank: int, alpha: float, targets: tuple[str, ...], seed: int) -> Any:
    """Freeze `unet` and put trainable adapters on the modules named `targets`; returns it.

    The paper's setting is rank 64, alpha 108 on to_q and to_v of all attentions. Adapters start as
    the identity, so the fake score starts as the teacher. Raises `UsageError` for targets that the
    UNet does not have.
    """
    unet.requires_grad_(False)
    config: Any = LoraConfig(r=rank, target_modules=list(targets), lora_dropout=0.0)
    config.lora_alpha = alpha  # annotated as a whole number, used as a factor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            unet.add_adapter(config, ADAPTER)
        except ValueError as error:
            raise UsageError(
                f"lora_targets {', '.join(targets)} cannot be adapted: {first_line(error)}",
                "The paper adapts to_q and to_v.",
            ) from error
    # A base in half precision would train its adapters in half: their updates need float32.
    for parameter in adapter_parameters(unet):
        parameter.data = parameter.data.float()
    return unet


def adapter_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, in a stable order."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


@contextmanager
def without_adapters(unet: Any) -> Iterator[None]:
    """Inside, `unet` is the frozen teacher."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


@torch.no_grad()
def guided_scores(
    unet: Any, noisy: Tensor, timesteps: Tensor, text: Tensor, null: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Guided noise predictions of teacher and fake score on the same noisy latents.

    `noisy` (B, 4, H, W), `timesteps` (B,), `text` (B, L, D), `null` (1, L, D). Returns two
    (B, 4, H, W). Guidance applies to both, as in SwiftBrush and TiUE.
    """
    with without_adapters(unet):
        teacher = guided_score(unet, noisy, timesteps, text, null, guidance)
    return teacher, guided_score(unet, noisy, timesteps, text, null, guidance)


def guided_score(
    unet: Any, noisy: Tensor, timesteps: Tensor, text: Tensor, null: Tensor, guidance: float
) -> Tensor:
    """Noise prediction (B, 4, H, W) of `unet` with guidance; the shapes of `guided_scores`."""
    both = torch.cat([text, null.expand_as(text)])  # (2B, L, D)
    predicted = unet(
        torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), both, return_dict=False
    )[0]
    conditional, unconditional = predicted.chunk(2)
    return guided(conditional, unconditional, guidance)
