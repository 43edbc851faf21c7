"""Drawing that starts from a picture: where a plan begins, and what stays outside a mask.

A sampler that starts later begins at the picture's latents with as much noise as its first timestep
has (SDEdit, Meng et al. 2022). The loop stays what it is: only its initial noise is another array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiue_export.sampling.ddim import alphas_cumprod
from tiue_export.sampling.few_step import schedule_settings
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.recipes import recipe_named
from tiue_export.specs import Array


@dataclass(frozen=True)
class NoiseLevel:
    """A noised picture as the network sees it: `picture` * its latents + `noise` * noise."""

    picture: float
    noise: float

    def mix(self, picture: Array, noise: Array) -> Array:
        """Latents of a picture and noise (B, 4, H, W) -> what the network sees, float64."""
        return self.picture * picture.astype(np.float64) + self.noise * noise.astype(np.float64)


def noise_levels(config: Mapping[str, Any], plan: Plan) -> tuple[NoiseLevel, ...]:
    """How much of a picture is in what each pass of a plan is fed; from scheduler_config.json.

    The network's input has unit variance whatever the sampler: sqrt(a_t) and sqrt(1 - a_t), of
    rectified flow 1 - t and t.
    """
    recipe = recipe_named(plan.recipe) if plan.recipe else None
    settings = config if recipe is None else schedule_settings(config, recipe)
    times = [one.encoder_timestep for one in plan.passes]
    if plan.scheduler == "flow":
        shares = [t / int(settings["num_train_timesteps"]) for t in times]
        return tuple(NoiseLevel(1 - share, share) for share in shares)
    if recipe is not None and recipe.alpha is not None:
        alphas = [recipe.alpha] * len(times)
    else:
        cumulative = alphas_cumprod(settings)
        alphas = [float(cumulative[int(t)]) for t in times]
    return tuple(NoiseLevel(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas)


def initial_noise(plan: Plan, level: NoiseLevel, picture: Array, noise: Array) -> Array:
    """What takes the place of the initial noise (B, 4, H, W), float32.

    The plan's first pass multiplies it by a constant of its own, which is taken out here.
    """
    own = plan.passes[0].input.noise
    mixed: Array = (level.mix(picture, noise) / own).astype(np.float32)
    return mixed


@dataclass(frozen=True)
class Kept:
    """What stays outside a mask: `mask` (B, 1, H, W) is 1 where is drawn, else 0.

    `picture` and `noise` (B, 4, H, W) are the latents of what stays, and the initial noise;
    `levels` their mixture at each pass. As the mask is 0 or 1, blending each sample that the
    network sees, and the result, is blending after each step of the sampler, as diffusers'
    StableDiffusionInpaintPipeline does: a step is linear in the sample.
    """

    mask: Array
    picture: Array
    noise: Array
    levels: tuple[NoiseLevel, ...]

    def sample(self, number: int, drawn: Array) -> Array:
        """What pass `number` is fed: drawn inside, noised as its timestep outside."""
        if number == 0:  # all of it is the start already
            return drawn
        return self._blended(drawn, self.levels[number].mix(self.picture, self.noise))

    def latents(self, drawn: Array) -> Array:
        """The result: drawn inside, the picture's own outside."""
        return self._blended(drawn, self.picture)

    def _blended(self, drawn: Array, own: Array) -> Array:
        blended: Array = np.where(self.mask > 0, drawn, own).astype(np.float32)
        return blended
