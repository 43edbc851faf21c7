"""Latent consistency distillation (LCM): what one step draws, computes and updates.

Luo et al. 2023 (arXiv 2310.04378), with one guidance scale for all: the student needs no input for
it, and is an ordinary UNet under LCMScheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import DistillConfig
from .consistency_losses import Solver, consistency
from .learner import (
    Average,
    Learner,
    check_batch,
    learning_rate_factor,
    mean_over_processes,
)
from .losses import add_noise, pseudo_huber
from .networks import Networks
from .samples import Samples, epoch_indices, step_generator
from .score_networks import guided_score
from .teacher_latents import teacher_latents


@dataclass(frozen=True)
class ConsistencyDraw(Samples):
    """One step's samples for one process: `latents` of pictures that show the prompts and `noise`,
    (B, 4, h, w) float32, and the solver's steps `indices` (B,) that the student is to skip.
    """

    latents: Tensor
    noise: Tensor
    indices: Tensor


class ConsistencyDistillation:
    """Networks, optimizer and average of one run; `step(n)` trains step n.

    The average is the paper's target network, and the student that is saved.
    """

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        prompts: Sequence[str],
        accelerator: Accelerator,
    ) -> None:
        check_batch(config, accelerator)
        self.config, self.networks, self.prompts = config, networks, prompts
        self.accelerator = accelerator
        self.solver = Solver.over(networks.alphas, config.solver_steps)
        self._unet: Any = networks.student.unet
        self._names = [name for name, _ in self._unet.named_parameters()]
        self._student = Learner(
            config,
            accelerator,
            self._unet,
            list(self._unet.parameters()),
            config.student_learning_rate,
        )
        self.average = Average(self._student, config.ema_decay, accelerator.device)
        self._null = networks.embed([""])  # (1, L, D)
        self._latents = torch.empty(0)

    def prepare(self) -> None:
        """What it learns on, made in the run's folder where it is not there yet."""
        self._latents = teacher_latents(self.config, self.networks, self.prompts, self.accelerator)

    def sample(self, noises: Tensor, text: Tensor) -> Tensor:
        """Noises (steps, B, 4, h, w), text (B, L, D) -> the student's latents (B, 4, h, w).

        As LCMScheduler draws: the picture of each step is noised again for the next.
        """
        sample = noises[0]
        for number, timestep in enumerate(self.networks.student.plan.timesteps):
            timesteps = torch.full((len(text),), int(timestep), device=sample.device)
            alphas = self.networks.alphas[timesteps]
            if number:
                sample = add_noise(sample, noises[number], alphas)
            predicted = self._unet(sample, timesteps, text, return_dict=False)[0]
            sample = consistency(sample, predicted, timesteps, alphas)
        return sample

    @property
    def parts(self) -> dict[str, Any]:
        """What a resumed run needs back, by name."""
        parts = {
            "student": self._unet,
            "student_optimizer": self._student.optimizer,
            "average": self.average,
        }
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def draw(self, step: int) -> ConsistencyDraw:
        """What this process trains on at `step`; pictures go round epoch by epoch."""
        config, accelerator = self.config, self.accelerator
        generator = step_generator(config, step)
        chosen = epoch_indices(config, len(self._latents), step)
        latents = self._latents[chosen].float()
        whole = ConsistencyDraw(
            prompts=[self.prompts[index % len(self.prompts)] for index in chosen],
            latents=latents,
            noise=torch.randn(latents.shape, generator=generator),
            indices=torch.randint(config.solver_steps, (config.batch,), generator=generator),
        )
        return whole.share(accelerator.process_index, accelerator.num_processes)

    def step(self, step: int) -> Mapping[str, float]:
        """One update of the student, then of its average."""
        config = self.config
        drawn = self.draw(step)
        parts = list(drawn.slices(config.micro_batch, self.accelerator.device))

        def loss_of(number: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss = self._loss(parts[number])
            return loss, {"loss": loss}

        figures, norm = self._student.update(
            [len(part) for part in parts], loss_of, learning_rate_factor(config, step)
        )
        self.average.follow()
        return mean_over_processes(self.accelerator, {**figures, "gradient_norm": norm})

    def _loss(self, part: ConsistencyDraw) -> Tensor:
        """The student at t against its average at the end of the teacher's step from t."""
        config, solver = self.config, self.solver
        text = self.networks.embed(part.prompts)
        timesteps, alphas = solver.timesteps[part.indices], solver.alphas[part.indices]
        noisy = add_noise(part.latents, part.noise, alphas)
        predicted = self._student.model(noisy, timesteps, text, return_dict=False)[0]
        with torch.no_grad():
            score = guided_score(
                self.networks.teacher, noisy, timesteps, text, self._null, config.guidance
            )
            nearer = solver.step(noisy, score, part.indices)
            targets = solver.targets[part.indices]
            averaged = self._averaged(nearer, targets, text)
            target = consistency(nearer, averaged, targets, solver.target_alphas[part.indices])
        return pseudo_huber(
            consistency(noisy, predicted, timesteps, alphas), target, config.huber_width
        )

    def _averaged(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The student's prediction with its averaged weights."""
        weights = dict(zip(self._names, self.average.weights.shadow_params, strict=True))
        output: Tensor = torch.func.functional_call(
            self._unet, weights, (noisy, timesteps, text), {"return_dict": False}
        )[0]
        return output
