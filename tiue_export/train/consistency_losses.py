"""Latent consistency distillation as pure functions (Luo et al. 2023, arXiv 2310.04378).

Latents and noise predictions are (B, 4, h, w); timesteps, indices and alphas (B,). Everything is
computed in float32 whatever the inputs' precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# As LCMScheduler has them, which draws with the trained student: f(x, 0) = x, and from t = 1 on
# the picture is nearly all the network's.
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class Solver:
    """The teacher's steps: DDIM over N evenly spaced timesteps that end at 0.

    `timesteps` (N,) ascending, the last of the schedule among them; a step from timesteps[i] leads
    to `targets`[i], where the schedule's alpha is `target_alphas`[i]. The paper's skipping step k
    is the schedule's length / N.
    """

    timesteps: Tensor
    targets: Tensor
    alphas: Tensor
    target_alphas: Tensor

    @classmethod
    def over(cls, alphas: Tensor, steps: int) -> Solver:
        """`steps` of them over a schedule of cumulative products `alphas` (1000,)."""
        skipped = len(alphas) // steps
        timesteps = torch.arange(1, steps + 1, device=alphas.device) * skipped - 1
        targets = (timesteps - skipped).clamp(min=0)
        return cls(timesteps, targets, alphas[timesteps], alphas[targets])

    def step(self, noisy: Tensor, predicted: Tensor, indices: Tensor) -> Tensor:
        """From timesteps[indices] to targets[indices], DDIM at eta 0."""
        picture = predicted_picture(noisy, predicted, self.alphas[indices])
        alphas = self.target_alphas[indices]
        return _per_sample(alphas.sqrt()) * picture + (
            _per_sample((1 - alphas).sqrt()) * predicted.float()
        )


def predicted_picture(noisy: Tensor, predicted: Tensor, alphas: Tensor) -> Tensor:
    """(x - sqrt(1 - a) e) / sqrt(a): the latents that a noise prediction stands for."""
    noise = _per_sample((1 - alphas.float()).sqrt()) * predicted.float()
    return (noisy.float() - noise) / _per_sample(alphas.float().sqrt())


def consistency(noisy: Tensor, predicted: Tensor, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """f(x, t) = c_skip(t) x + c_out(t) picture, Eq. 9 of the paper; f(x, 0) = x."""
    scaled = timesteps.float() * TIMESTEP_SCALING
    spread = scaled.square() + SIGMA_DATA**2
    skip, out = SIGMA_DATA**2 / spread, scaled / spread.sqrt()
    picture = predicted_picture(noisy, predicted, alphas)
    return _per_sample(skip) * noisy.float() + _per_sample(out) * picture


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
