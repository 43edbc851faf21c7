"""A network that learns: one update of its weights over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from tiue_export.errors import UsageError

from .config import DistillConfig

# Micro-batch number n -> its loss, the mean over its samples, and what else is worth logging.
LossOf = Callable[[int], tuple[Tensor, Mapping[str, Tensor]]]


class Learner:
    """`parameters` of `model` under Adam at `rate`; `model` is then the one to call."""

    def __init__(
        self,
        config: DistillConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        parameters: list[torch.nn.Parameter],
        rate: float,
    ) -> None:
        self._accelerator, self._rate, self._clip = accelerator, rate, config.gradient_clip
        self.parameters = parameters
        betas = (config.adam_beta1, config.adam_beta2)
        optimizer = torch.optim.Adam(parameters, rate, betas=betas)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def update(
        self, sizes: Sequence[int], loss_of: LossOf, rate_factor: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One update on micro-batches of `sizes` samples; returns mean figures and gradient norm.

        The norm is that before clipping, 0 for a skipped update: under fp16 an update whose
        gradient overflowed is skipped, and the loss scale halved: that is how the scale is found,
        not a failure.
        """
        accelerator, whole = self._accelerator, sum(sizes)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate * rate_factor
        sums: dict[str, Tensor] = {}
        for number, size in enumerate(sizes):
            # Between micro-batches the processes keep their gradients to themselves.
            last = number == len(sizes) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss, figures = loss_of(number)
                accelerator.backward(loss * (size / whole))
            for name, value in figures.items():
                share = size / whole * value.detach()
                sums[name] = share if number == 0 else sums[name] + share
        norm = accelerator.clip_grad_norm_(self.parameters, self._clip)
        self.optimizer.step()
        # At once, as another optimizer's clipping would unscale these gradients again.
        self.optimizer.zero_grad()
        return sums, torch.zeros(()) if self.skipped else torch.as_tensor(norm)

    @property
    def skipped(self) -> bool:
        """Whether the last update was skipped."""
        return bool(self.optimizer.step_was_skipped)


class Average:
    """The moving average of a learner's weights, as a state that comes back on its device."""

    def __init__(self, learner: Learner, decay: float, device: torch.device) -> None:
        self._learner, self._device = learner, device
        self.weights = EMAModel(learner.parameters, decay=decay)

    def follow(self) -> None:
        """Take in the learner's last update."""
        if not self._learner.skipped:
            self.weights.step(self._learner.parameters)

    def state_dict(self) -> Any:
        """What EMAModel saves."""
        return self.weights.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """A state is read on the CPU."""
        self.weights.load_state_dict(state)
        self.weights.to(self._device)


def learning_rate_factor(config: DistillConfig, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to `final_rate`; the paper's is constant."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + np.cos(np.pi * step / config.iterations))
    return float(warm * (config.final_rate + (1 - config.final_rate) * cosine))


def mean_over_processes(
    accelerator: Accelerator, figures: Mapping[str, Tensor]
) -> dict[str, float]:
    """Figures by name, averaged over all processes."""
    names = sorted(figures)
    stacked = torch.stack([figures[name].float().to(accelerator.device) for name in names])
    means = accelerator.reduce(stacked, "mean")
    return dict(zip(names, means.tolist(), strict=True))


def check_batch(config: DistillConfig, accelerator: Accelerator) -> None:
    """Refuse a batch that the processes cannot share."""
    world = accelerator.num_processes
    if config.batch % world:
        raise UsageError(
            f"batch is {config.batch}, which {world} processes cannot share evenly",
            f"Set batch to a multiple of {world}.",
        )
