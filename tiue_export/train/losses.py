"""Losses as pure functions: TiUE's (CVPR 2025, "One-Way Ticket", Sec. 3 and appendix), Huber's.

Latents are (B, 4, H, W), noise predictions too; `alphas` are cumulative products of 1 - beta at
each sample's timestep, (B,). Everything is computed in float32 whatever the inputs' precision.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: e_uncond + g * (e_cond - e_uncond), float32."""
    return unconditional.float() + guidance * (conditional.float() - unconditional.float())


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """sqrt(a) * latents + sqrt(1 - a) * noise (DDPM's forward process), float32."""
    root, sigma = alphas.float().sqrt(), (1 - alphas.float()).sqrt()
    return _per_sample(root) * latents.float() + _per_sample(sigma) * noise.float()


def vsd_gradient(teacher: Tensor, fake: Tensor, alphas: Tensor) -> Tensor:
    """(1 - alpha_bar) * (e_teacher - e_fake), the gradient of VSD with w(t) = sigma_t^2.

    `teacher` and `fake` are guided predictions on the same noisy latents (Wang et al. 2023,
    ProlificDreamer, Eq. 9; Nguyen and Tran 2024, SwiftBrush). Non-finite entries become 0, so that
    one overflown prediction does not end a run. Detached.
    """
    weight = _per_sample(1 - alphas.float())
    return torch.nan_to_num(weight * (teacher.float() - fake.float()), 0.0, 0.0, 0.0).detach()


def vsd_loss(latents: Tensor, gradient: Tensor) -> Tensor:
    """Scalar whose gradient with respect to `latents` is `gradient` / latents.numel()."""
    latents = latents.float()
    target = (latents - gradient).detach()
    return 0.5 * (latents - target).square().mean()


def fake_score_loss(predicted: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Mean of alpha_bar * (e_fake - noise)^2: the LoRA teacher learns the student's pictures."""
    weight = _per_sample(alphas.float())
    return (weight * (predicted.float() - noise.float()).square()).mean()


def noise_kl(outputs: Tensor, steps: int) -> Tensor:
    """KL(N(mu, s^2) || N(0, 1)) of each predicted noise; summed over steps, mean over the batch.

    `outputs` (K*B, 4, H, W), step-major. mu and s^2 (unbiased) pool all values of one prediction:
    0.5 * (mu^2 + s^2 - 1 - ln s^2). The published code sums over a device's batch of 8 at weight
    0.1; as a mean over the batch that is a weight of 0.8, and it stays so for every batch.
    """
    values = outputs.float().flatten(1)  # (K*B, N)
    mean, variance = values.mean(1), values.var(1)
    divergence = 0.5 * (mean.square() + variance - 1 - variance.log())  # (K*B,)
    return divergence.reshape(steps, -1).sum(0).mean()


def pseudo_huber(predicted: Tensor, target: Tensor, width: float) -> Tensor:
    """Mean of sqrt(d^2 + width^2) - width: |d| beyond `width`, d^2 / (2 width) within it."""
    difference = predicted.float() - target.float()
    return ((difference.square() + width**2).sqrt() - width).mean()


def clip_loss(images: Tensor, texts: Tensor, threshold: float) -> Tensor:
    """relu(threshold - mean cosine) of CLIP features (B, D): a push until pictures fit enough."""
    cosine = torch.nn.functional.cosine_similarity(images.float(), texts.float(), dim=-1)
    return torch.relu(threshold - cosine.mean())


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
