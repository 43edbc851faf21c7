"""A picture as the start of a drawing: its latents, noised as far as the plan's first pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.drawing.source_picture import SourcePicture, latent_mask
from tiue_export.errors import UsageError
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.picture_start import Kept, NoiseLevel, initial_noise, noise_levels
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.sampling.strength import USUAL_MASKED_STRENGTH, USUAL_STRENGTH
from tiue_export.specs import VAE_ENCODER, Array


@dataclass(frozen=True)
class Start:
    """Where a drawing starts. `mean` and `spread` (1, 4, H, W) are of its latents, scaled.

    `sampled`: the latents are drawn from them, else they are the mean. `from_noise`: nothing of the
    picture is in what is drawn inside of the mask. `strength` is told with the picture;
    `stage_latency_ms` what encoding it took.
    """

    source: SourcePicture
    mean: Array
    spread: Array
    levels: tuple[NoiseLevel, ...]
    strength: float | None
    sampled: bool = False
    from_noise: bool = False
    stage_latency_ms: Mapping[str, list[float]] = field(default_factory=dict)

    def apply(
        self, plan: Plan, noises: Array, seeds: Sequence[int], px_per_latent: int
    ) -> tuple[Array, Kept | None]:
        """Noises (N, B, 4, H, W) with the start as the first of them, and what the mask keeps.

        Row b's latents are sampled, where they are, by the noise that follows the plan's in the
        stream of its seed.
        """
        latents = np.broadcast_to(self.mean, noises.shape[1:])
        if self.sampled:
            shape = (1, *noises.shape[2:])
            drawn = [noises_from_seed(seed, plan.noises + 1, shape)[-1] for seed in seeds]
            latents = self.mean + self.spread * np.concatenate(drawn)
        kept = None
        if self.source.mask is not None:
            mask = latent_mask(self.source.mask, px_per_latent)
            kept = Kept(mask, latents, noises[0], self.levels)
        if self.from_noise:
            return noises, kept
        first = initial_noise(plan, self.levels[0], latents, noises[0])
        return np.concatenate([first[None], noises[1:]]), kept

    @property
    def parameters(self) -> dict[str, object]:
        """What a picture tells of its start."""
        return {
            "image": self.source.digest,
            **({} if self.strength is None else {"strength": self.strength}),
            **({} if self.source.mask is None else {"mask": True}),
            **({"sampled": True} if self.sampled else {}),
        }


def started_change(
    plan: Plan, strength: float | None, steps: int | None, *, masked: bool
) -> PlanChange:
    """How a plan changes where it starts from a picture; `strength` None is the usual one.

    A student whose graphs hold their timestep starts there: it has no strength to choose.
    """
    held = plan.one_pass or not (plan.recipe or plan.guidance is not None)
    if held and steps is not None:
        raise UsageError(
            f"a student of {plan.rows} rows in one pass has no steps to choose",
            "Leave --steps out.",
        )
    if strength is None and not held:
        strength = USUAL_MASKED_STRENGTH if masked else USUAL_STRENGTH
    return PlanChange(steps=steps, strength=strength)


def start_of(
    bundle: Bundle,
    source: SourcePicture,
    parameters: Array,
    strength: float | None,
    *,
    sampled: bool,
) -> Start:
    """The start of a bundle's plan at a picture, of which the VAE's encoder gave `parameters`.

    Those are (1, 8, H, W), mean and logarithm of the variance, or (1, 4, H, W), the mean alone.
    """
    scale, channels = bundle.manifest.vae_scaling_factor, int(bundle.manifest.latent_shape[1])
    mean, spread = parameters[:, :channels], np.zeros_like(parameters[:, :channels])
    if parameters.shape[1] > channels:  # diffusers' DiagonalGaussianDistribution
        spread = np.exp(0.5 * np.clip(parameters[:, channels:], -30, 20))
    elif sampled:
        raise UsageError(
            f"{bundle.root} has a VAE whose encoder gives one latent for each, none to sample",
            "Leave --sampled out.",
        )
    config = bundle.json_object("scheduler/scheduler_config.json")
    plan = bundle.manifest.plan
    return Start(
        source,
        (mean * scale).astype(np.float32),
        (spread * scale).astype(np.float32),
        noise_levels(config, plan),
        strength,
        sampled,
        from_noise=source.mask is not None and strength == USUAL_MASKED_STRENGTH,
    )


def check_takes_pictures(bundle: Bundle) -> None:
    """Refuse a picture where no graph encodes it."""
    if VAE_ENCODER not in bundle.manifest.graphs:
        raise UsageError(
            f"{bundle.root} has no VAE encoder, so it starts from no picture",
            "Export it with --with-vae-encoder.",
        )


def refuse_without_picture(**given: object) -> None:
    """Refuse what says how to start from a picture where there is none."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UsageError(
                f"--{name} is of a drawing that starts from a picture, and none was given",
                "Add --image PICTURE.",
            )
