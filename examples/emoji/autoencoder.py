"""The demo family's autoencoder: diffusers' AutoencoderTiny, 128 px <-> (4, 16, 16) latents.

Two phases in one run: encoder and decoder together, then the decoder alone behind the frozen
encoder, with noise on the latents. The teacher trains on the latents of phase one, so it can start
while phase two still sharpens the pictures.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional

from tiue_export.train.run_folder import RunFolder

from .corpus import Emoji, fingerprint
from .drawing import draw

WIDTH = 48


@dataclass(frozen=True)
class AutoencoderSettings:
    """What decides the outcome. Pictures are 128 px, `batch` of them a step."""

    joint_steps: int = 2200
    decoder_steps: int = 6000
    batch: int = 16
    learning_rate: float = 2e-3
    edge_weight: float = 1.0
    # Standard deviation, in units of the latents' own, that the decoder learns to forgive.
    latent_noise: float = 0.05
    ema_decay: float = 0.998
    seed: int = 0
    save_every: int = 200

    @property
    def steps(self) -> int:
        """All steps of both phases."""
        return self.joint_steps + self.decoder_steps


def build_autoencoder() -> Any:
    """About 1.1 M parameters; no block at full resolution in the encoder, one in the decoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 3, 2, 1),
    ).to(memory_format=torch.channels_last)


def train_autoencoder(corpus: tuple[Emoji, ...], out: Path, settings: AutoencoderSettings) -> None:
    """Train, or go on training, in `out`; returns when all steps are done."""
    run = RunFolder(out, {**asdict(settings), "corpus": fingerprint(corpus), "width": WIDTH})
    torch.manual_seed(settings.seed)
    model = build_autoencoder()
    average = build_autoencoder().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate, betas=(0.9, 0.99))
    latent_std = torch.tensor(1.0)
    start = 0
    if (state := run.load()) is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        latent_std, start = state["latent_std"], state["step"]
    began = time.perf_counter()
    for step in range(start, settings.steps):
        joint = step < settings.joint_steps
        if step == settings.joint_steps:
            model.load_state_dict(average.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings)
        pictures = _batch(corpus, settings, step)
        noise = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(joint):
                latents = model.encoder(pictures).float()
            if joint:
                latent_std = 0.99 * latent_std + 0.01 * latents.detach().std()
            latents = latents + settings.latent_noise * latent_std * torch.randn(
                latents.shape, generator=noise
            )
            drawn = model.decoder(latents)
        loss, error = reconstruction_loss(drawn.float(), pictures, settings.edge_weight)
        # Keeps latents near zero mean and unit variance, as a diffusion model wants them.
        spread = (latents.var((0, 2, 3)).log() ** 2).mean() + (latents.mean((0, 2, 3)) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * spread if joint else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _update_average(average, model, min(settings.ema_decay, (1 + step) / (10 + step)))
        if (step + 1) % 20 == 0:
            psnr_db = float(-10 * error.log10())
            seconds = time.perf_counter() - began
            run.log(step + 1, loss=loss.item(), psnr_db=psnr_db, latent_std=latents.std().item())
            rate = (step + 1 - start) * settings.batch / seconds
            print(f"{step + 1}/{settings.steps} {psnr_db:.2f} dB {rate:.1f} pictures/s", flush=True)
        if (step + 1) % settings.save_every == 0 or step + 1 in (
            settings.joint_steps,
            settings.steps,
        ):
            run.save(
                step + 1,
                model=model.state_dict(),
                average=average.state_dict(),
                optimizer=optimizer.state_dict(),
                latent_std=latent_std,
            )


def reconstruction_loss(drawn: Tensor, pictures: Tensor, edge_weight: float) -> tuple[Tensor, Tensor]:
    """L1 plus an edge term (L1 of neighbouring pixels' differences), and the mean squared error.

    Both are (B, 3, 128, 128) in [-1, 1]; the results are in units of [0, 1].
    """
    error = (drawn - pictures) / 2
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return error.abs().mean() + edge_weight * edges, error.detach().square().mean()


def _schedule(step: int, settings: AutoencoderSettings) -> float:
    """Warm-up of 100 steps and cosine decay to a tenth, once for each phase."""
    joint = step < settings.joint_steps
    length = settings.joint_steps if joint else settings.decoder_steps
    place = step if joint else step - settings.joint_steps
    decayed = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * place / length))
    return float(min(1.0, (place + 1) / 100) * decayed * (1.0 if joint else 0.5))


def _batch(corpus: tuple[Emoji, ...], settings: AutoencoderSettings, step: int) -> Tensor:
    """(B, 3, 128, 128) in [-1, 1], the same for the same step."""
    generator = np.random.default_rng([settings.seed, 1, step])
    chosen = generator.choice(len(corpus), settings.batch, replace=False)
    pictures = np.stack([draw(corpus[index], generator).picture for index in chosen])
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.to(memory_format=torch.channels_last)


@torch.no_grad()
def _update_average(average: Any, model: Any, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)

