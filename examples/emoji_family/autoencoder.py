"""The demo family's autoencoder: diffusers' AutoencoderTiny, 128 px <-> (4, 16, 16) latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.training_utils import EMAModel
from torch import Tensor

from tiue_export.train.cpu_precision import cpu_autocast, cpu_precision
from tiue_export.train.loop import train
from tiue_export.train.run_folder import RunFolder

from .corpus import Emoji, fingerprint
from .drawing import PICTURE_SIZE, draw

WIDTH = 48
_NEW_DRAWINGS = 8  # a stream that no training draws from


@dataclass(frozen=True)
class AutoencoderSettings:
    """What decides the outcome: `batch` windows of `window_px` a step, cut from 128 px pictures.

    Many small steps: this network learns by their number, hardly by the pixels in each.
    """

    steps: int = 5000
    batch: int = 4
    window_px: int = 64
    learning_rate: float = 1e-3
    edge_weight: float = 1.0
    # Standard deviation, in units of the latents' own, that the decoder learns to forgive.
    latent_noise: float = 0.05
    seed: int = 0


def build_autoencoder() -> Any:
    """About 1.1 M parameters; no block at full resolution in the encoder, one in the decoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(3, 3, 2, 1),
    ).to(memory_format=torch.channels_last)


def train_autoencoder(
    corpus: tuple[Emoji, ...],
    out: Path,
    settings: AutoencoderSettings,
) -> Any:
    """Train, or go on training, in `out`; returns the averaged AutoencoderTiny."""
    decides = {"corpus": fingerprint(corpus), "width": WIDTH, "precision": cpu_precision()}
    run = RunFolder(out, {**asdict(settings), **decides})
    torch.manual_seed(settings.seed)
    model = build_autoencoder()
    trained = list(model.parameters())
    average = EMAModel(trained, decay=0.999)
    optimizer = torch.optim.Adam(trained, settings.learning_rate, betas=(0.9, 0.99))

    def one_step(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        loss, figures = _loss(model, _batch(corpus, settings, step), settings, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.step(trained)
        return figures

    parts = {"model": model, "average": average, "optimizer": optimizer}
    train(run, parts, settings.steps, one_step, title="autoencoder")
    average.copy_to(trained)
    return model.eval()


@torch.no_grad()
def reconstruction_psnr_db(model: Any, corpus: tuple[Emoji, ...]) -> float:
    """Mean over one new drawing of each emoji: encoded, decoded, compared, in dB of [0, 255]."""
    ratios_db = []
    for index, emoji in enumerate(corpus):
        picture = draw(emoji, np.random.default_rng([_NEW_DRAWINGS, index])).picture
        pixels = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        drawn = model.decoder(model.encoder(pixels)).clamp(-1, 1)  # (1, 3, 128, 128)
        ratios_db.append(-10 * float(((drawn - pixels) / 2).square().mean().log10()))
    return float(np.mean(ratios_db))


def _loss(
    model: Any, pictures: Tensor, settings: AutoencoderSettings, step: int
) -> tuple[Tensor, dict[str, float]]:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    with cpu_autocast():
        latents = model.encoder(pictures).float()  # (B, 4, 16, 16)
        noise = torch.randn(latents.shape, generator=generator) * latents.detach().std()
        drawn = model.decoder(latents + settings.latent_noise * noise).float()
    loss, error = reconstruction_loss(drawn, pictures, settings.edge_weight)
    # Keeps each channel near zero mean and unit variance, as a diffusion model wants it.
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    loss = loss + 0.01 * (variance.log().square().mean() + mean.square().mean())
    figures = {
        "loss": float(loss.detach()),
        "psnr_db": float(-10 * error.log10()),
        "latent_std": float(latents.detach().std()),
    }
    return loss, figures


def reconstruction_loss(
    drawn: Tensor, pictures: Tensor, edge_weight: float
) -> tuple[Tensor, Tensor]:
    """L1 plus an edge term (L1 of neighbouring pixels' differences), and the mean squared error.

    Both are (B, 3, W, W) in [-1, 1]; the results are in units of [0, 1].
    """
    error = (drawn - pictures) / 2
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return error.abs().mean() + edge_weight * edges, error.detach().square().mean()


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: warm-up of 50 steps, then a cosine down to a fiftieth."""
    return float(min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + np.cos(np.pi * step / steps))))


def _batch(corpus: tuple[Emoji, ...], settings: AutoencoderSettings, step: int) -> Tensor:
    """(B, 3, W, W) in [-1, 1], W = window_px; the same for the same step."""
    generator = np.random.default_rng([settings.seed, 1, step])
    windows = []
    for index in generator.choice(len(corpus), settings.batch, replace=False):
        picture = draw(corpus[index], generator).picture
        top, left = generator.integers(PICTURE_SIZE - settings.window_px + 1, size=2)
        windows.append(picture[top : top + settings.window_px, left : left + settings.window_px])
    tensor = torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.to(memory_format=torch.channels_last)
