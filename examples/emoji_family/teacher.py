"""The demo's teacher: a small Stable Diffusion, text encoder and UNet trained together.

Epsilon prediction on SD's own noise schedule, with null captions for guidance. It learns on 64 px
pictures first, where a step costs a third, and goes on at 128 px, in two rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.parts import load_text_encoder
from tiue_export.train.cpu_precision import cpu_autocast, cpu_precision
from tiue_export.train.loop import train
from tiue_export.train.run_folder import RunFolder

from .latents import LatentSet

_NULL_SHARE = 0.1
# Hang et al. 2023 (arXiv 2303.09556): weights min(SNR, 5) / SNR let all noise levels learn at once.
_SNR_CEILING = 5.0
# SD's schedule leaves 7 % of the picture in its noisiest step: of 16x16 latents the mean can be
# read there, and a teacher that relies on it finds no dark ground in pure noise. Noise with a mean
# of its own hides it ("offset noise", Guttenberg 2023). Dark grounds were missed before and are
# right since; more training came with it, so what each did was not told apart.
_NOISE_MEAN_STD = 0.1


@dataclass(frozen=True)
class TeacherSettings:
    """What decides the outcome of one phase; `steps` of `batch` latents each."""

    steps: int
    batch: int
    learning_rate: float
    # Factor that the cosine ends at; 1 keeps the rate.
    final_rate: float
    warmup: int = 100
    seed: int = 0


SMALL = TeacherSettings(steps=1000, batch=32, learning_rate=1e-3, final_rate=0.5)
LARGE = TeacherSettings(steps=2700, batch=16, learning_rate=7e-4, final_rate=0.01, seed=1)
# Again from the full rate: after one round (of 48 names) rockets and owls were blots, after two
# (the second of 32) they are told at a glance.
AGAIN = replace(LARGE, seed=2)


class Teacher(nn.Module):
    """Text encoder and UNet as one module: token ids (B, 77), latents (B, 4, h, w) -> noise."""

    def __init__(self) -> None:
        super().__init__()
        family = load_family("demo")
        self.text_encoder: Any = CLIPTextModel(CLIPTextConfig(**family.text_encoder))
        self.unet: Any = UNet2DConditionModel.from_config(family.unet)
        self.unet.to(memory_format=torch.channels_last)
        # At 256 tokens, plain products train a fifth faster on CPUs than fused attention.
        self.unet.set_attn_processor(AttnProcessor())

    @classmethod
    def from_pipeline(cls, folder: Path) -> Teacher:
        """The teacher in a diffusers pipeline folder, in float32."""
        teacher = cls()
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        teacher.unet.load_state_dict(unet.state_dict())
        teacher.text_encoder.load_state_dict(
            load_text_encoder(folder / "text_encoder").float().state_dict()
        )
        return teacher

    @property
    def sha256(self) -> str:
        """Of all weights: what a phase starts from decides where it ends."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        text = self.text_encoder(ids).last_hidden_state  # (B, 77, D)
        predicted: Tensor = self.unet(latents, timesteps, text, return_dict=False)[0]
        return predicted


def train_teacher(
    data: LatentSet,
    tokenizer: CLIPTokenizer,
    out: Path,
    settings: TeacherSettings,
    start_from: Teacher | None = None,
    after_save: Callable[[int, Teacher], None] = lambda step, teacher: None,
) -> Teacher:
    """Train, or go on training, in `out`; returns the averaged teacher."""
    decides = {
        "pictures": len(data.captions),
        "precision": cpu_precision(),
        "noise_mean_std": _NOISE_MEAN_STD,
        "start": None if start_from is None else start_from.sha256,
    }
    run = RunFolder(out, {**asdict(settings), **decides})
    torch.manual_seed(settings.seed)
    teacher = Teacher()
    if start_from is not None:
        teacher.load_state_dict(start_from.state_dict())
    parameters = list(teacher.parameters())
    average = EMAModel(parameters, decay=0.999)
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    scheduler = DDIMScheduler.from_config(load_family("demo").scheduler)
    ids = _token_ids(tokenizer, data.captions)
    null = _token_ids(tokenizer, [""])[0]

    def one_step(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        chosen = torch.randint(len(ids), (settings.batch,), generator=generator)
        latents = data.latents[chosen].float()
        tokens = ids[chosen].long()
        dropped = torch.rand(settings.batch, generator=generator) < _NULL_SHARE
        tokens[dropped] = null.long()
        noise = torch.randn(latents.shape, generator=generator)
        noise += _NOISE_MEAN_STD * torch.randn((*latents.shape[:2], 1, 1), generator=generator)
        timesteps = torch.randint(1000, (settings.batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with cpu_autocast():
            predicted = teacher(noisy, timesteps, tokens).float()
        errors = functional.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))  # (B,)
        weights = compute_snr(scheduler, timesteps).clamp(max=_SNR_CEILING)
        weights = weights / compute_snr(scheduler, timesteps)
        loss = (weights * errors).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step(parameters)
        return {
            "loss": float(loss.detach()),
            "noise_mse": float(errors.detach().mean()),
            "gradient_norm": float(gradient),
        }

    def saved(step: int) -> None:
        average.store(parameters)
        average.copy_to(parameters)
        after_save(step, teacher)
        average.restore(parameters)

    title = f"teacher {data.latents.shape[-1] * 8} px"
    parts = {"teacher": teacher, "average": average, "optimizer": optimizer}
    train(run, parts, settings.steps, one_step, title=title, after_save=saved)
    average.copy_to(parameters)
    return teacher.eval()


def _token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(N, 77) int16."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="np")
    return torch.from_numpy(np.asarray(encoded["input_ids"], dtype=np.int16))


def _rate(step: int, settings: TeacherSettings) -> float:
    """Factor of the learning rate: warm-up, then a cosine to `final_rate`."""
    cosine = 0.5 * (1 + np.cos(np.pi * step / settings.steps))
    decayed = settings.final_rate + (1 - settings.final_rate) * cosine
    return float(min(1.0, (step + 1) / settings.warmup) * decayed)
