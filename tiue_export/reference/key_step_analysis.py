"""Measure what Faster Diffusion rests on, on one checkpoint: block changes, and what sharing costs.

For each prompt: along plain sampling, how much every block's output changes from step to step and
how large it is (the analyses of Faster Diffusion, section 3.2 and appendix A.1), and what every
possible group of steps would cost the picture. From the latter follow key steps for a budget; they
are then drawn, beside the published ones and uniform ones, on prompts that took no part.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tiue_export.errors import RuntimeFailure
from tiue_export.methods.scheduler import diffusers_scheduler, plan_from_config
from tiue_export.proof.key_step_results import (
    AnalysisRequest,
    BlockCurves,
    Candidate,
    PromptResult,
    losses_of,
)
from tiue_export.reference.sharing_cost import (
    TorchModel,
    deviation,
    every_step,
    group_losses,
)
from tiue_export.reference.unet_blocks import named_blocks, watched_blocks
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import key_steps_from
from tiue_export.sampling.key_steps import choose_key_steps, cost_of, encoder_runs_within, loss_of
from tiue_export.sampling.sampler import OnStep
from tiue_export.specs import Array

# Scenes of many kinds, for measuring what no single prompt shows.
DEFAULT_PROMPTS = (
    "a red fox sitting in fresh snow, soft morning light",
    "an old fishing boat on a calm lake at sunrise",
    "two children flying a kite on a windy beach",
    "a bowl of ramen with a soft egg on a wooden table",
    "a narrow street with yellow houses after the rain",
    "a man repairing a bicycle in a small workshop",
    "a black cat asleep on a pile of books",
    "a mountain railway crossing a stone bridge in autumn",
    "a vase of white tulips beside an open window",
    "a crowded vegetable market seen from above",
    "an astronaut riding a green horse on the moon",
    "a lighthouse in a storm, oil painting",
    "a herd of elephants walking through tall grass",
    "a kitchen with copper pans hanging over the stove",
    "a tennis player about to hit the ball",
    "a snow-covered pine forest under the northern lights",
)


@dataclass
class _Followed:
    """One block's curves in the making."""

    change: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    last: Tensor | None = None

    def add(self, row: Tensor) -> None:
        """The block's output (C, h, w) of the next step."""
        if self.last is not None:
            self.change.append(float((row - self.last).square().mean()))
        self.norm.append(float(row.mean(0).norm()))
        self.last = row.clone()


def measure_prompt(
    model: TorchModel,
    request: AnalysisRequest,
    prompt: str,
    seed: int,
    on_step: OnStep = lambda done, total: None,
) -> PromptResult:
    """Both measurements of one prompt. Raises `RuntimeFailure` when a feature is not finite."""
    start = time.perf_counter()
    options = FasterOptions(request.scheduler, request.steps, guidance=request.guidance)
    text = model.text(prompt)
    blocks = _blocks(model, options, seed, text)
    for name, curves in blocks.items():
        if not np.isfinite([*curves.change, *curves.norm]).all():
            raise RuntimeFailure(f"{name} gave non-finite features for {prompt[:50]!r}")
    plan = every_step(model.teacher, options)
    losses = group_losses(model, plan, seed, text, request.guidance, request.reach, on_step)
    return PromptResult(
        prompt,
        seed,
        round(time.perf_counter() - start, 3),
        blocks,
        tuple(tuple(float(x) if np.isfinite(x) else None for x in row) for row in losses),
    )


@torch.no_grad()
def _blocks(
    model: TorchModel, options: FasterOptions, seed: int, text: Array
) -> dict[str, BlockCurves]:
    """Plain sampling by diffusers' own UNet and scheduler, watched."""
    teacher = model.teacher
    unet = teacher.unet.float()
    scheduler = diffusers_scheduler(
        teacher.scheduler_config, options.scheduler, options.asked_steps
    )
    sample, embedding = torch.from_numpy(model.noise(seed)), torch.from_numpy(text)
    blocks = {name: _Followed() for name in named_blocks(unet)}
    with watched_blocks(unet, lambda name, row: blocks[name].add(row)):
        for timestep in scheduler.timesteps:
            pair = unet(torch.cat([sample, sample]), timestep, embedding).sample
            without, conditioned = pair.chunk(2)
            output = without + options.guidance * (conditioned - without)
            sample = scheduler.step(output, timestep, sample).prev_sample
    return {name: BlockCurves(tuple(b.change), tuple(b.norm)) for name, b in blocks.items()}


def candidates(
    model: TorchModel,
    request: AnalysisRequest,
    results: Sequence[PromptResult],
    budget: float | None,
    held_out: Sequence[tuple[str, int]],
    on_step: OnStep = lambda done, total: None,
) -> list[Candidate]:
    """The published key steps, uniform and chosen ones with as many encoder runs, and `budget`'s.

    Each is drawn without injection on `held_out` (prompt, seed) and held against plain sampling.
    """
    losses = losses_of(results)
    count, share = len(losses) - 1, model.encoder_share
    published = key_steps_from("nonuniform", count)
    runs = len(published)
    stride = -(-count // runs)
    listed = {
        "published": published,
        f"uniform:{stride}": key_steps_from(f"uniform:{stride}", count),
        f"chosen, {runs} runs": choose_key_steps(losses, runs).key_steps,
    }
    if budget is not None:
        within = encoder_runs_within(budget, count, share)
        listed[f"chosen, budget {budget:g}"] = choose_key_steps(losses, within).key_steps
    options = FasterOptions(request.scheduler, request.steps, guidance=request.guidance)
    plain = every_step(model.teacher, options)
    texts = [model.text(prompt) for prompt, _ in held_out]
    total, done = (len(listed) + 1) * len(held_out), 0
    latents = []
    for text, (_, seed) in zip(texts, held_out, strict=True):
        latents.append(model.latents(plain, seed, text, request.guidance))
        done += 1
        on_step(done, total)
    found = []
    for name, key_steps in listed.items():
        chosen = FasterOptions(request.scheduler, request.steps, key_steps, "off", request.guidance)
        plan = plan_from_config(model.teacher.scheduler_config, chosen)
        off = []
        for text, reference, (_, seed) in zip(texts, latents, held_out, strict=True):
            drawn = model.latents(plan, seed, text, request.guidance)
            off.append(deviation(reference, drawn))
            done += 1
            on_step(done, total)
        cost, predicted = cost_of(len(key_steps), count, share), loss_of(losses, key_steps)
        found.append(Candidate(name, key_steps, cost, predicted, tuple(off)))
    return found
