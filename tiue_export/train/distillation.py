"""The distillation itself: what one step draws, computes and updates (method, section B.2).

Everything random is drawn for the whole batch from (seed, step), and each process takes its slice:
two processes compute what one does, and a resumed run what an unbroken one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from tiue_export.errors import UsageError

from .clip_term import ClipTerm, load_clip_term
from .config import DistillConfig
from .losses import fake_score_loss, noise_kl, vsd_gradient, vsd_loss
from .networks import Networks
from .score_networks import adapter_parameters, guided_scores

# Published ranges: VSD leaves the ends of the schedule out, the fake score sees all of it.
_VSD_TIMESTEPS = (20, 981)
_FAKE_TIMESTEPS = (0, 1000)


@dataclass(frozen=True)
class Draw:
    """All that is random in one step, for the samples of one process.

    `prompts` (B); noises (B, 4, h, w) float32; timesteps (B,) int64; `null` (B,) marks samples
    whose fake score learns without a prompt.
    """

    prompts: list[str]
    noise: Tensor
    vsd_noise: Tensor
    vsd_timesteps: Tensor
    fake_noise: Tensor
    fake_timesteps: Tensor
    null: Tensor

    def slices(self, size: int, device: torch.device) -> Iterator[Draw]:
        """Parts of at most `size` samples, on `device`."""
        for first in range(0, len(self.prompts), size):
            part = slice(first, first + size)
            tensors = {
                name: getattr(self, name)[part].to(device)
                for name in self.__dataclass_fields__
                if name != "prompts"
            }
            yield Draw(self.prompts[part], **tensors)


def draw(
    config: DistillConfig,
    prompts: Sequence[str],
    latent_shape: tuple[int, ...],
    step: int,
    rank: int = 0,
    world: int = 1,
) -> Draw:
    """What process `rank` of `world` trains on at `step`; prompts go round epoch by epoch."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    shape = (config.batch, *latent_shape)
    whole = Draw(
        prompts=[prompts[index] for index in _prompt_indices(config, len(prompts), step)],
        noise=torch.randn(shape, generator=generator),
        vsd_noise=torch.randn(shape, generator=generator),
        vsd_timesteps=torch.randint(*_VSD_TIMESTEPS, (config.batch,), generator=generator),
        fake_noise=torch.randn(shape, generator=generator),
        fake_timesteps=torch.randint(*_FAKE_TIMESTEPS, (config.batch,), generator=generator),
        null=torch.rand(config.batch, generator=generator) < config.null_share,
    )
    own = config.batch // world
    return list(whole.slices(own, torch.device("cpu")))[rank]


def _prompt_indices(config: DistillConfig, count: int, step: int) -> list[int]:
    """Each epoch is a permutation of its own; a batch may span two of them."""
    indices = []
    for place in range(step * config.batch, (step + 1) * config.batch):
        epoch, offset = divmod(place, count)
        indices.append(int(_permutation(config.seed, epoch, count)[offset]))
    return indices


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Distillation:
    """Networks, optimizers and average of one run; `step(n)` trains step n."""

    def __init__(
        self,
        config: DistillConfig,
        networks: Networks,
        prompts: Sequence[str],
        accelerator: Accelerator,
    ) -> None:
        world = accelerator.num_processes
        if config.batch % world:
            raise UsageError(
                f"batch is {config.batch}, which {world} processes cannot share evenly",
                f"Set batch to a multiple of {world}.",
            )
        self.config, self.networks, self.prompts = config, networks, prompts
        self.accelerator = accelerator
        betas = (config.adam_beta1, config.adam_beta2)
        self._student_parameters = list(networks.student.parameters())
        self._fake_parameters = adapter_parameters(networks.scores)
        student_optimizer = torch.optim.Adam(
            self._student_parameters, config.student_learning_rate, betas=betas
        )
        fake_optimizer = torch.optim.Adam(
            self._fake_parameters, config.lora_learning_rate, betas=betas
        )
        self.average = EMAModel(self._student_parameters, decay=config.ema_decay)
        self._student, self._scores, self._student_optimizer, self._fake_optimizer = (
            accelerator.prepare(
                networks.student, networks.scores, student_optimizer, fake_optimizer
            )
        )
        self._null = networks.embed([""])  # (1, L, D)
        self._clip: ClipTerm | None = load_clip_term(config, accelerator.device)

    @property
    def parts(self) -> dict[str, Any]:
        """What a resumed run needs back, by name."""
        parts = {
            "student": self.networks.student,
            "fake_score": _Adapters(self._fake_parameters),
            "student_optimizer": self._student_optimizer,
            "fake_optimizer": self._fake_optimizer,
            "average": _Average(self.average, self.accelerator.device),
        }
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def step(self, step: int) -> Mapping[str, float]:
        """One update of the student, then one of the fake score on the same pictures."""
        config, accelerator = self.config, self.accelerator
        for group in self._student_optimizer.param_groups:
            group["lr"] = config.student_learning_rate * learning_rate_factor(config, step)
        for group in self._fake_optimizer.param_groups:
            warm = min(1.0, (step + 1) / (config.lora_warmup_steps + 1))
            group["lr"] = config.lora_learning_rate * warm
        drawn = draw(
            config,
            self.prompts,
            self.networks.latent_shape,
            step,
            accelerator.process_index,
            accelerator.num_processes,
        )
        parts = list(drawn.slices(config.micro_batch, accelerator.device))
        texts = [self.networks.embed(part.prompts) for part in parts]
        figures, latents = self._update_student(parts, texts, step)
        figures |= self._update_fake_score(parts, texts, latents)
        means = self._mean_over_processes(figures)
        # Squares can be averaged over parts and processes, their roots cannot.
        means["vsd_gradient_rms"] = math.sqrt(means.pop("vsd_gradient_square"))
        return means

    def _update_student(
        self, parts: list[Draw], texts: list[Tensor], step: int
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        accelerator = self.accelerator
        sums: dict[str, Tensor] = {}
        latents = []
        for part, text, synchronise, share in self._weighted(parts, texts):
            with self._synchronised(self._student, synchronise):
                with accelerator.autocast():
                    predicted = self._student(part.noise, text)
                    loss, figures = self._student_loss(part, text, predicted, step)
                accelerator.backward(loss * share)
            latents.append(predicted.latents.detach())
            _add(sums, {**figures, "loss": loss.detach()}, share)
        norm = self._clip_and_step(self._student_optimizer, self._student_parameters)
        if not self._student_optimizer.step_was_skipped:
            self.average.step(self._student_parameters)
        return {**sums, "gradient_norm": norm}, latents

    def _clip_and_step(self, optimizer: Any, parameters: list[torch.nn.Parameter]) -> Tensor:
        """One update; returns the gradient's norm before clipping, 0 for a skipped update.

        Under fp16 an update whose gradient overflowed is skipped, and the loss scale halved: that
        is how the scale is found, not a failure.
        """
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.gradient_clip)
        optimizer.step()
        # At once, as the other optimizer's clipping would unscale these gradients again.
        optimizer.zero_grad()
        return torch.zeros(()) if optimizer.step_was_skipped else torch.as_tensor(norm)

    def _student_loss(
        self, part: Draw, text: Tensor, predicted: Any, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """VSD on the latents, KL on the predictions, CLIP on the picture where it is asked for."""
        config, networks = self.config, self.networks
        alphas = networks.alphas[part.vsd_timesteps]
        noisy = add_noise(predicted.latents.detach(), part.vsd_noise, alphas)
        teacher, fake = guided_scores(
            networks.scores, noisy, part.vsd_timesteps, text, self._null, config.guidance
        )
        gradient = vsd_gradient(teacher, fake, alphas)
        loss = vsd_loss(predicted.latents, gradient)
        figures = {"vsd_gradient_square": gradient.square().mean()}
        if config.kl_weight:
            divergence = noise_kl(predicted.outputs, networks.student.plan.rows)
            loss = loss + config.kl_weight * divergence
            figures["noise_kl"] = divergence.detach()
        if self._clip is not None:
            term = self._clip(predicted.latents, part.prompts)
            loss = loss + self._clip.weight(step) * term
            figures["clip"] = term.detach()
        return loss, figures

    def _update_fake_score(
        self, parts: list[Draw], texts: list[Tensor], latents: list[Tensor]
    ) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        weighted = self._weighted(parts, texts)
        for drawn, (part, text, synchronise, share) in zip(latents, weighted, strict=True):
            alphas = self.networks.alphas[part.fake_timesteps]
            noisy = add_noise(drawn, part.fake_noise, alphas)
            conditions = torch.where(part.null.view(-1, 1, 1), self._null, text)
            with self._synchronised(self._scores, synchronise):
                with self.accelerator.autocast():
                    predicted = self._scores(
                        noisy, part.fake_timesteps, conditions, return_dict=False
                    )[0]
                    loss = fake_score_loss(predicted, part.fake_noise, alphas)
                self.accelerator.backward(loss * share)
            _add(sums, {"fake_score": loss.detach()}, share)
        self._clip_and_step(self._fake_optimizer, self._fake_parameters)
        return sums

    def _weighted(
        self, parts: list[Draw], texts: list[Tensor]
    ) -> Iterator[tuple[Draw, Tensor, bool, float]]:
        """Each micro-batch with its text, whether gradients meet after it, and its share."""
        whole = sum(len(part.prompts) for part in parts)
        for number, (part, text) in enumerate(zip(parts, texts, strict=True), 1):
            yield part, text, number == len(parts), len(part.prompts) / whole

    def _synchronised(self, model: Any, synchronise: bool) -> AbstractContextManager[None]:
        """Between micro-batches the processes keep their gradients to themselves."""
        return nullcontext() if synchronise else self.accelerator.no_sync(model)

    def _mean_over_processes(self, figures: Mapping[str, Tensor]) -> dict[str, float]:
        names = sorted(figures)
        stacked = torch.stack([figures[name].float().to(self.accelerator.device) for name in names])
        means = self.accelerator.reduce(stacked, "mean")
        return dict(zip(names, means.tolist(), strict=True))


def add_noise(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """sqrt(a) * latents + sqrt(1 - a) * noise (DDPM's forward process), (B, 4, h, w) float32."""
    root = alphas.sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas).sqrt().view(-1, 1, 1, 1)
    return root * latents.float() + sigma * noise


def learning_rate_factor(config: DistillConfig, step: int) -> float:
    """Linear warm-up, then a cosine from 1 to `final_rate`; the paper's is constant."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    cosine = 0.5 * (1 + np.cos(np.pi * step / config.iterations))
    return float(warm * (config.final_rate + (1 - config.final_rate) * cosine))


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


class _Average:
    """The average as a state that comes back on `device`: a state is read on the CPU."""

    def __init__(self, average: Any, device: torch.device) -> None:
        self._average, self._device = average, device

    def state_dict(self) -> Any:
        return self._average.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._average.load_state_dict(state)
        self._average.to(self._device)


def _add(sums: dict[str, Tensor], figures: Mapping[str, Tensor], share: float) -> None:
    for name, value in figures.items():
        sums[name] = sums.get(name, torch.zeros((), device=value.device)) + share * value
