"""Score distillation, of TiUE and of one-step students: what one step computes and updates.

For a batch of prompts the student draws, teacher and fake score say how its pictures should change
(method, section B.2), and the fake score learns those pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .clip_term import ClipTerm, load_clip_term
from .config import DistillConfig
from .learner import (
    Average,
    Learner,
    check_batch,
    learning_rate_factor,
    mean_over_processes,
)
from .losses import (
    add_noise,
    fake_score_loss,
    noise_kl,
    pseudo_huber,
    vsd_gradient,
    vsd_loss,
)
from .networks import Networks
from .samples import Samples, epoch_indices, step_generator
from .score_networks import adapter_parameters, guided_scores, without_adapters
from .teacher_latents import starting_noise, teacher_latents

# Published ranges: VSD leaves the ends of the schedule out, the fake score sees all of it.
_VSD_TIMESTEPS = (20, 981)
_FAKE_TIMESTEPS = (0, 1000)


@dataclass(frozen=True)
class Draw(Samples):
    """All that is random in one step, for the samples of one process.

    Noises (B, 4, h, w) float32; timesteps (B,) int64; `null` (B,) marks samples whose fake score
    learns without a prompt. `teacher` (B, 4, h, w) is what the teacher drew from `noise`; without
    regression nothing is known of it and it is (B, 0).
    """

    noise: Tensor
    vsd_noise: Tensor
    vsd_timesteps: Tensor
    fake_noise: Tensor
    fake_timesteps: Tensor
    null: Tensor
    teacher: Tensor


def draw(
    config: DistillConfig,
    prompts: Sequence[str],
    latent_shape: tuple[int, ...],
    step: int,
    rank: int = 0,
    world: int = 1,
    pictures: Tensor | None = None,
) -> Draw:
    """What process `rank` of `world` trains on at `step`; prompts go round epoch by epoch.

    With the teacher's `pictures`, those go round, each with its prompt and its noise.
    """
    generator = step_generator(config, step)
    shape = (config.batch, *latent_shape)
    noise = torch.randn(shape, generator=generator)
    teacher = torch.empty(config.batch, 0)
    chosen = epoch_indices(config, len(prompts if pictures is None else pictures), step)
    if pictures is not None:
        noise, teacher = starting_noise(config, latent_shape, chosen), pictures[chosen].float()
    whole = Draw(
        prompts=[prompts[index % len(prompts)] for index in chosen],
        noise=noise,
        vsd_noise=torch.randn(shape, generator=generator),
        vsd_timesteps=torch.randint(*_VSD_TIMESTEPS, (config.batch,), generator=generator),
        fake_noise=torch.randn(shape, generator=generator),
        fake_timesteps=torch.randint(*_FAKE_TIMESTEPS, (config.batch,), generator=generator),
        null=torch.rand(config.batch, generator=generator) < config.null_share,
        teacher=teacher,
    )
    return whole.share(rank, world)


class ScoreDistillation:
    """Networks, optimizers and average of one run; `step(n)` trains step n."""

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
        self._student = Learner(
            config,
            accelerator,
            networks.student,
            list(networks.student.parameters()),
            config.student_learning_rate,
        )
        self._fake = Learner(
            config,
            accelerator,
            networks.teacher,
            adapter_parameters(networks.teacher),
            config.lora_learning_rate,
        )
        self.average = Average(self._student, config.ema_decay, accelerator.device)
        self._null = networks.embed([""])  # (1, L, D)
        self._clip: ClipTerm | None = load_clip_term(config, accelerator.device)
        self._pictures: Tensor | None = None

    def prepare(self) -> None:
        """Of regression, what the teacher draws; else prompts are all that it learns on."""
        if not self.config.learns_on_pictures:
            return
        with without_adapters(self.networks.teacher):
            self._pictures = teacher_latents(
                self.config, self.networks, self.prompts, self.accelerator
            )

    def sample(self, noises: Tensor, text: Tensor) -> Tensor:
        """Noises (1, B, 4, h, w), text (B, L, D) -> the student's latents (B, 4, h, w)."""
        return self.networks.student.sample(noises[0], text)

    @property
    def parts(self) -> dict[str, Any]:
        """What a resumed run needs back, by name."""
        parts = {
            "student": self.networks.student,
            "fake_score": _Adapters(self._fake.parameters),
            "student_optimizer": self._student.optimizer,
            "fake_optimizer": self._fake.optimizer,
            "average": self.average,
        }
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def step(self, step: int) -> Mapping[str, float]:
        """One update of the student, then one of the fake score on the same pictures."""
        config, accelerator = self.config, self.accelerator
        drawn = draw(
            config,
            self.prompts,
            self.networks.latent_shape,
            step,
            accelerator.process_index,
            accelerator.num_processes,
            self._pictures,
        )
        parts = list(drawn.slices(config.micro_batch, accelerator.device))
        texts = [self.networks.embed(part.prompts) for part in parts]
        sizes = [len(part) for part in parts]
        latents: list[Tensor] = []

        def student_loss(number: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            predicted = self._student.model(parts[number].noise, texts[number])
            latents.append(predicted.latents.detach())
            return self._student_loss(parts[number], texts[number], predicted, step)

        def fake_loss(number: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss = self._fake_loss(parts[number], texts[number], latents[number])
            return loss, {"fake_score": loss}

        rate = learning_rate_factor(config, step)
        figures, norm = self._student.update(sizes, student_loss, rate)
        self.average.follow()
        warm = min(1.0, (step + 1) / (config.lora_warmup_steps + 1))
        fake_figures, _ = self._fake.update(sizes, fake_loss, warm)
        means = mean_over_processes(accelerator, {**figures, **fake_figures, "gradient_norm": norm})
        # Squares can be averaged over parts and processes, their roots cannot.
        means["vsd_gradient_rms"] = math.sqrt(means.pop("vsd_gradient_square"))
        return means

    def _student_loss(
        self, part: Draw, text: Tensor, predicted: Any, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """VSD on the latents and KL on the predictions; regression and CLIP where asked for."""
        config, networks = self.config, self.networks
        alphas = networks.alphas[part.vsd_timesteps]
        noisy = add_noise(predicted.latents.detach(), part.vsd_noise, alphas)
        teacher, fake = guided_scores(
            networks.teacher, noisy, part.vsd_timesteps, text, self._null, config.guidance
        )
        gradient = vsd_gradient(teacher, fake, alphas)
        loss = vsd_loss(predicted.latents, gradient)
        figures = {"vsd_gradient_square": gradient.square().mean()}
        if config.kl_weight:
            divergence = noise_kl(predicted.outputs, networks.student.plan.rows)
            loss = loss + config.kl_weight * divergence
            figures["noise_kl"] = divergence
        if config.regression_weight:
            distance = pseudo_huber(predicted.latents, part.teacher, config.huber_width)
            loss = loss + config.regression_weight * distance
            figures["regression"] = distance
        if self._clip is not None:
            term = self._clip(predicted.latents, part.prompts)
            loss = loss + self._clip.weight(step) * term
            figures["clip"] = term
        return loss, {**figures, "loss": loss}

    def _fake_loss(self, part: Draw, text: Tensor, latents: Tensor) -> Tensor:
        alphas = self.networks.alphas[part.fake_timesteps]
        noisy = add_noise(latents, part.fake_noise, alphas)
        conditions = torch.where(part.null.view(-1, 1, 1), self._null, text)
        predicted = self._fake.model(noisy, part.fake_timesteps, conditions, return_dict=False)[0]
        return fake_score_loss(predicted, part.fake_noise, alphas)


class _Adapters:
    """The fake score's trainable parameters as a state; the base weights need no saving."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def state_dict(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters]

    @torch.no_grad()
    def load_state_dict(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, state, strict=True):
            parameter.copy_(value)
