"""Prompt to picture on any runtime: tokens, text, UNet, VAE.

The UNet part is the plan that the manifest holds: one pass of a TiUE student, or several.

Needs numpy, tokenizers and pillow; the runtime brings the rest. It knows graph names and specs,
never a backend; tensors travel between graphs by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiue_export.bundle.chain import SCALED_LATENTS, TOKENS, scaled_latents
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.drawing.picture import image_from_pixels, pixels_from_sample, save_png
from tiue_export.drawing.picture_parameters import picture_parameters
from tiue_export.drawing.prompt_weights import parse_weights, weighted_text, weighted_tokens
from tiue_export.drawing.source_picture import (
    PictureSource,
    SourcePicture,
    pasted,
    source_picture,
)
from tiue_export.drawing.start import (
    Start,
    check_takes_pictures,
    refuse_without_picture,
    start_of,
    started_change,
)
from tiue_export.drawing.text_memory import TextMemory
from tiue_export.drawing.tokenizer import Tokenizer, tokenizer_of_bundle
from tiue_export.drawing.vae_tiles import decode_in_tiles, is_tiled, tile_size
from tiue_export.errors import UsageError
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.noise import check_picture_count, check_seeds, noises_from_seed
from tiue_export.sampling.picture_start import Kept
from tiue_export.sampling.plan import check_guidance
from tiue_export.sampling.plan_change import PlanChange, changed_plan
from tiue_export.sampling.sampler import OnStep, sample
from tiue_export.specs import (
    CONTROLNET,
    TEXT_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
    BatchLimited,
    ChainRuntime,
    Runtime,
    RuntimeOptions,
    check_finite,
    step_limit,
)

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One generated image with what made it; `seed` None when the noise was given.

    `latents` (4, H, W) float32, before the VAE. `guidance` None: the bundle has none to choose.
    `parameters` are all of that, the model and the runtime, as a PNG carries them.
    """

    image: Image
    prompt: str
    seed: int | None
    latents: Array
    negative_prompt: str = ""
    guidance: float | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a PNG that carries `parameters`, as `tiue-export generate` does.

        Raises `UsageError` for another kind of file.
        """
        if Path(path).suffix.lower() != ".png":
            raise UsageError(
                f"{path} is no .png file, which carries how a picture was made",
                "Name a .png file, or take the picture alone: picture.image.save(PATH).",
            )
        save_png(self.image, Path(path), self.parameters)


class Job(NamedTuple):
    """One picture to draw; `negative` and `guidance` (None: the plan's) where it has guidance.

    `weighted`: brackets in its prompts are weights (`prompt_weights.py`).
    """

    prompt: str
    seed: int
    negative: str = ""
    guidance: float | None = None
    weighted: bool = False


def _no_step(done: int, total: int) -> None:
    """Nobody listens."""


class Loop(NamedTuple):
    """What else decides a drawing: who listens, what a ControlNet is fed, what a mask keeps."""

    on_step: OnStep = _no_step
    control: Mapping[str, Array] | None = None
    kept: Kept | None = None


@dataclass(frozen=True)
class Result:
    """Pictures in request order (prompt by prompt, seed by seed), and time per stage and run.

    The text of a prompt that was drawn a moment ago is known: its encoder does not run again. Where
    drawing starts from a picture, that was encoded once, before.
    """

    pictures: list[Picture]
    stage_latency_ms: Mapping[str, list[float]]

    @property
    def images(self) -> list[Image]:
        return [picture.image for picture in self.pictures]


@dataclass(frozen=True)
class Pipeline:
    """An opened bundle on an opened runtime. Use it as a context manager, or close it.

    >>> with Pipeline.open("bundle") as pipeline:          # doctest: +SKIP
    ...     pipeline("a red fox", seed=0).pictures[0].save("fox.png")
    """

    bundle: Bundle
    runtime: Runtime
    tokenizer: Tokenizer
    _texts: TextMemory = field(default_factory=TextMemory, repr=False, compare=False)
    _start: Start | None = field(default=None, repr=False, compare=False)
    _timer: Callable[[], float] = field(default=time.perf_counter, repr=False)

    @staticmethod
    def open(
        bundle: Bundle | str | Path,
        runtime: str | Runtime = "ort",
        options: RuntimeOptions | None = None,
    ) -> Pipeline:
        """Open a bundle (every hash checked) on a runtime by name, or on one already open."""
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        for graph in (TEXT_ENCODER, VAE_DECODER):
            opened.spec(graph)
        tokenizer = tokenizer_of_bundle(opened)
        if isinstance(runtime, str):
            runtime = open_runtime(runtime, opened, options or RuntimeOptions())
        return Pipeline(opened, runtime, tokenizer)

    def replanned(self, change: PlanChange) -> Pipeline:
        """The same graphs under another plan of Faster Diffusion; the runtime is shared.

        >>> plain = pipeline.replanned(PlanChange(steps=25, key_steps="uniform:1", inject="off"))
        ... # doctest: +SKIP
        """
        return replace(self, bundle=replanned(self.bundle, change))

    def starting_at(
        self,
        image: PictureSource | SourcePicture,
        mask: PictureSource | None = None,
        *,
        strength: float | None = None,
        steps: int | None = None,
        sampled: bool = False,
    ) -> Pipeline:
        """The same graphs, which start from a picture; the runtime is shared.

        The bundle is one exported with `--with-vae-encoder`. `image` is a file, its bytes, Pillow's
        image or an array; with a `mask`, white where is drawn anew, the rest stays. `strength` is
        the share of noise it starts with, above 0 to 1: None is 0.8, with a mask 1; a TiUE student
        has its own. `steps` are the sampler's, of which that share is done. The picture's latents
        are the mean of what the VAE's encoder gives, or are `sampled` from it, by the seed.

        >>> edited = pipeline.starting_at("fox.png", strength=0.5)    # doctest: +SKIP
        >>> edited("a red fox in snow", seed=0).pictures[0].save("snow.png")  # doctest: +SKIP
        """
        check_takes_pictures(self.bundle)
        manifest = self.bundle.manifest
        if isinstance(image, SourcePicture):
            if mask is not None:
                raise UsageError("a SourcePicture brings its mask; another was given", "Give one.")
            source = image
        else:
            source = source_picture(image, (manifest.width_px, manifest.height_px), mask)
        masked = source.mask is not None
        change = started_change(manifest.plan, strength, steps, masked=masked)
        bundle = replanned(self.bundle, change)
        stages: dict[str, list[float]] = {}
        parameters = self.encode(source.pixels[None], stages)
        start = start_of(bundle, source, parameters, change.strength, sampled=sampled)
        start = replace(start, stage_latency_ms=stages)
        return replace(self, bundle=bundle, _start=start)

    def forgetful(self) -> Pipeline:
        """The same, which knows no text from before: its first drawing runs every graph."""
        return replace(self, _texts=TextMemory())

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        count: int = 1,
        latents: Array | None = None,
        guidance: float | Sequence[float] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_weights: bool = False,
        control: Array | None = None,
        control_scale: float = 1.0,
        image: PictureSource | SourcePicture | None = None,
        mask: PictureSource | None = None,
        strength: float | None = None,
        steps: int | None = None,
        sampled: bool = False,
        on_picture: Callable[[Picture], None] = lambda picture: None,
        on_step: OnStep = _no_step,
    ) -> Result:
        """Draw `count` pictures of each prompt; picture i of a prompt uses seed + i.

        `latents` (N, 4, H, W) float32 replaces the seeded noises of every picture, N = 1 (the axis
        may then be left out) or 1 + the plan's fresh noises; it must then be one picture per
        prompt. `on_picture` is called as each is finished.

        Where guidance is not distilled in: `guidance` and `negative_prompt` for all prompts or one
        for each. `on_step(done, total)` is called while a batch of pictures is drawn in passes.
        `prompt_weights` reads "(word:1.3)" as a weight (`prompt_weights.py`); else it is letters.
        `control` (3, 8H, 8W) float in [0, 1] and its strength are for bundles with a ControlNet.
        `image`, `mask`, `strength`, `steps` and `sampled` are `starting_at`'s.
        """
        if image is None:
            refuse_without_picture(mask=mask, strength=strength, steps=steps, sampled=sampled)
            drawing = self
        else:
            if sampled and latents is not None:
                raise UsageError(
                    "the latents of a picture are sampled by the seed, and latents were given for "
                    "the noise",
                    "Give a seed, or leave --sampled out.",
                )
            drawing = self.starting_at(image, mask, strength=strength, steps=steps, sampled=sampled)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("no prompt was given")
        if count < 1:
            raise UsageError(f"count is {count}; expected 1 or more")
        if latents is not None and count != 1:
            raise UsageError("latents fix the noise, so count must be 1")
        shape = tuple(int(side) for side in drawing.bundle.manifest.latent_shape[1:])
        noises = drawing.bundle.manifest.plan.noises
        if latents is not None and latents.shape not in _noise_shapes(noises, shape):
            raise UsageError(f"latents have shape {latents.shape}; expected {(noises, *shape)}")
        check_seeds(seed, count)
        check_picture_count(len(prompts) * count)
        scales, negatives = drawing._steering(guidance, negative_prompt, len(prompts))
        jobs = [
            Job(text, seed + i, negatives[number], scales[number], prompt_weights)
            for number, text in enumerate(prompts)
            for i in range(count)
        ]
        loop = Loop(on_step, drawing._control(control, control_scale))
        return drawing._draw_all(jobs, latents, on_picture, loop)

    def _control(self, picture: Array | None, scale: float) -> dict[str, Array] | None:
        """What the ControlNet's graph is fed beside the sample; a bundle without one takes none."""
        record = self.bundle.manifest.graphs.get(CONTROLNET)
        if record is None:
            if picture is None:
                return None
            raise UsageError(
                f"{self.bundle.root} has no ControlNet, so it takes no picture to follow",
                "Export it with --method faster --controlnet FOLDER.",
            )
        if picture is None:
            raise picture_to_follow(self.bundle)
        spec = next(tensor for tensor in record.inputs if tensor.name == "controlnet_cond")
        shape = tuple(int(side) for side in spec.shape[1:])
        if picture.shape != shape:
            raise UsageError(f"control has shape {picture.shape}; expected {shape}")
        if not (np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1):
            raise UsageError("control has values outside of [0, 1]")
        rows = np.broadcast_to(picture.astype(np.float32), (int(spec.shape[0]), *shape))
        return {
            "controlnet_cond": np.ascontiguousarray(rows),
            "conditioning_scale": np.array([scale], np.float32),
        }

    def _steering(
        self,
        guidance: float | Sequence[float] | None,
        negative_prompt: str | Sequence[str] | None,
        count: int,
    ) -> tuple[list[float | None], list[str]]:
        """Guidance and negative prompt of each prompt; refused where guidance is distilled in."""
        if guidance is None and negative_prompt is None:
            return [None] * count, [""] * count
        check_steering(self.bundle, guidance is not None)
        if guidance is None or isinstance(guidance, (int, float)):
            scales: list[float | None] = [guidance] * count
        else:
            scales = list(guidance)
        if negative_prompt is None or isinstance(negative_prompt, str):
            negatives = [negative_prompt or ""] * count
        else:
            negatives = list(negative_prompt)
        for name, values in (("guidance", scales), ("negative_prompt", negatives)):
            if len(values) != count:
                raise UsageError(
                    f"{name} has {len(values)} values for {count} prompts; expected 1 or {count}"
                )
        for scale in scales:
            if scale is not None:
                check_guidance(scale)
        return scales, negatives

    def draw(
        self,
        jobs: Sequence[tuple[str, int] | Job],
        on_picture: Callable[[Picture], None] = lambda picture: None,
    ) -> Result:
        """Draw one picture for each (prompt, seed) or `Job`, as many a run as the batch allows."""
        if not jobs:
            raise UsageError("no prompt was given")
        listed = [Job(*job) for job in jobs]
        for job in listed:
            check_seeds(job.seed, 1)
            if job.guidance is not None or job.negative:
                self._steering(job.guidance, job.negative, 1)
        return self._draw_all(listed, None, on_picture, Loop(control=self._control(None, 1.0)))

    def _draw_all(
        self,
        jobs: list[Job],
        latents: Array | None,
        on_picture: Callable[[Picture], None],
        loop: Loop,
    ) -> Result:
        for job in jobs:
            for text in (job.prompt, job.negative) if job.weighted else ():
                parse_weights(text)  # refuses before anything is drawn
        smallest, largest = self.batch_range()
        pictures: list[Picture] = []
        known = {} if self._start is None else self._start.stage_latency_ms
        stages = {stage: list(times) for stage, times in known.items()}
        for start in range(0, len(jobs), largest):
            chunk = jobs[start : start + largest]
            size = max(smallest, len(chunk))
            for picture in self._draw(chunk, size, latents, stages, loop):
                on_picture(picture)
                pictures.append(picture)
        return Result(pictures, stages)

    def batch_range(self) -> tuple[int, int]:
        """The smallest and largest batch to run: the bundle's, or a dynamic one within limits."""
        batch = self.bundle.manifest.batch
        if batch is not None:
            return batch, batch
        if not isinstance(self.runtime, BatchLimited):
            return 1, DYNAMIC_BATCH
        smallest, largest = self.runtime.batch_range()
        return smallest, max(smallest, min(largest, DYNAMIC_BATCH))

    def _draw(
        self,
        jobs: list[Job],
        size: int,
        latents: Array | None,
        stages: dict[str, list[float]],
        loop: Loop,
    ) -> list[Picture]:
        """One run of all graphs; a static batch is filled up by repeating the last job."""
        filled = jobs + [jobs[-1]] * (size - len(jobs))
        shape = tuple(int(side) for side in self.bundle.manifest.latent_shape[1:])
        count = self.bundle.manifest.plan.noises
        if latents is None:
            rows = [noises_from_seed(job.seed, count, (1, *shape)) for job in filled]
        else:
            rows = [latents.astype(np.float32).reshape(count, 1, *shape)] * len(filled)
        noises = np.concatenate(rows, axis=1)  # (N, B, 4, H, W)
        start, kept = self._start, None
        if start is not None:
            manifest, seeds = self.bundle.manifest, [job.seed for job in filled]
            noises, kept = start.apply(manifest.plan, noises, seeds, manifest.vae_scale)
        result, picture = self._run_all(filled, noises, stages, loop._replace(kept=kept))
        if start is not None and start.source.mask is not None:
            scale = self.bundle.manifest.vae_scale
            picture = pasted(picture, start.source.pixels, start.source.mask, scale)
        pixels = pixels_from_sample(picture)
        pictures = []
        for row, job in enumerate(jobs):
            seed = job.seed if latents is None else None
            steering = job.negative, self._guidance(job)
            parameters = picture_parameters(
                job.prompt, seed, *steering, job.weighted, self.bundle.manifest, self.runtime
            )
            if start is not None:
                parameters |= start.parameters
            image = image_from_pixels(pixels[row])
            pictures.append(Picture(image, job.prompt, seed, result[row], *steering, parameters))
        return pictures

    def _guidance(self, job: Job) -> float | None:
        """The scale a picture is drawn with, None where it is distilled in."""
        scale = self.bundle.manifest.plan.guidance
        return scale if scale is None or job.guidance is None else job.guidance

    def _run_all(
        self, jobs: list[Job], noises: Array, stages: dict[str, list[float]], loop: Loop
    ) -> tuple[Array, Array]:
        """Latents (B, 4, H, W) and picture (B, 3, 8H, 8W), in one go where the runtime can."""
        tokens, weights = self._tokens([(job.prompt, job.weighted) for job in jobs])
        # A chain hands text and latents on inside the device: it cannot weigh or tile them.
        if (
            weights is None
            and loop.kept is None
            and self.bundle.manifest.plan.one_pass
            and isinstance(self.runtime, ChainRuntime)
            and not is_tiled(self.bundle.spec(VAE_DECODER), noises[0])
        ):
            chained = self.runtime.run_chain(tokens, noises[0])
            if chained is not None:
                for stage, latency_ms in chained.stage_latency_ms.items():
                    stages.setdefault(stage, []).append(latency_ms)
                return chained.latents, chained.picture
        text = self._embedded(tokens, weights, stages)  # (B, L, D)
        scales = [scale for job in jobs if (scale := self._guidance(job)) is not None]
        if scales:
            asked = self._tokens([(job.negative, job.weighted) for job in jobs])
            negative = self._embedded(*asked, stages)
            text = np.concatenate([negative, text])  # (2B, L, D)
        latents = self._sample(noises, text, stages, scales or None, loop)
        return latents, self.decode(latents, stages)

    def embed(self, prompts: Sequence[str], stages: dict[str, list[float]] | None = None) -> Array:
        """Prompts -> text embedding (B, L, D); brackets are letters."""
        return self._embedded(self.tokenizer(prompts), None, stages)

    def _tokens(self, prompts: Sequence[tuple[str, bool]]) -> tuple[Array, Array | None]:
        """Token ids (B, L) of prompts, and their weights (None: all 1) where brackets are some."""
        ids = self.tokenizer([prompt for prompt, _ in prompts])
        weights = np.ones(ids.shape, np.float32)
        for row, (prompt, weighted) in enumerate(prompts):
            if weighted:
                (ids[row],), (weights[row],) = weighted_tokens(self.tokenizer, [prompt])
        return ids, None if (weights == 1).all() else weights

    def _embedded(
        self, tokens: Array, weights: Array | None, stages: dict[str, list[float]] | None
    ) -> Array:
        def embed() -> Array:
            (made,) = self._run(TEXT_ENCODER, {TOKENS: tokens}, stages).values()
            return made

        text = self._texts.embedding(tokens, embed)
        return text if weights is None else weighted_text(text, weights)

    def latents_from_noise(self, noises: Array, text: Array) -> Array:
        """Noises (N, B, 4, H, W) and text (B, L, D) -> latents (B, 4, H, W).

        N is the plan's `noises`; where it is 1, (B, 4, H, W) will do. With guidance, which is the
        plan's, text is (2B, L, D), negative prompts first. A ControlNet would need its picture:
        `UsageError`.
        """
        noises = noises if noises.ndim == 5 else noises[None]
        return self._sample(noises, text, None, None, Loop(control=self._control(None, 1.0)))

    def _sample(
        self,
        noises: Array,
        text: Array,
        stages: dict[str, list[float]] | None,
        guidance: Sequence[float] | None,
        loop: Loop,
    ) -> Array:
        def run(graph: str, pool: Mapping[str, Array]) -> dict[str, Array]:
            return self._run(graph, pool, stages)

        plan = self.bundle.manifest.plan.bounded(step_limit(self.runtime), len(text))
        return sample(plan, run, noises, text, guidance, *loop)

    def decode(self, latents: Array, stages: dict[str, list[float]] | None = None) -> Array:
        """Latents (B, 4, H, W) -> picture (B, 3, 8H, 8W), about [-1, 1]; tiled if exported so."""
        scaled = scaled_latents(latents, self.bundle.manifest.vae_scaling_factor)
        tiles: dict[str, list[float]] = {}

        def decode(tile: Array) -> Array:
            (picture,) = self._run(VAE_DECODER, {SCALED_LATENTS: tile}, tiles).values()
            return picture

        picture = decode_in_tiles(decode, scaled, tile_size(self.bundle.spec(VAE_DECODER)))
        if stages is not None:
            stages.setdefault(VAE_DECODER, []).append(sum(tiles[VAE_DECODER]))
        return picture

    def encode(self, pictures: Array, stages: dict[str, list[float]] | None = None) -> Array:
        """Pictures (B, 3, 8H, 8W) in [-1, 1] -> what their latents are drawn from, (B, C, H, W).

        C is 8, mean and logarithm of the variance, or of AutoencoderTiny 4; before scaling. In a
        bundle of a fixed batch as many run as it takes, the last one repeated.
        """
        size = self.bundle.manifest.batch
        filled = pictures
        if size is not None and len(pictures) % size:
            missing = size - len(pictures) % size
            filled = np.concatenate([pictures, np.repeat(pictures[-1:], missing, axis=0)])
        parts = []
        for run in np.split(filled, len(filled) // size) if size else [filled]:
            (parameters,) = self._run(VAE_ENCODER, {"sample": run}, stages).values()
            parts.append(parameters)
        return np.concatenate(parts)[: len(pictures)]

    def _run(
        self, graph: str, pool: Mapping[str, Array], stages: dict[str, list[float]] | None
    ) -> dict[str, Array]:
        feeds = self.bundle.spec(graph).select(pool)
        start = self._timer()
        outputs = self.runtime.run(graph, feeds)
        if stages is not None:
            stages.setdefault(graph, []).append((self._timer() - start) * 1e3)
        check_finite(graph, outputs)
        return outputs

    def close(self) -> None:
        """Close the runtime."""
        self.runtime.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


DYNAMIC_BATCH = 4


def replanned(bundle: Bundle, change: PlanChange) -> Bundle:
    """The bundle with another plan for its graphs, which depend on none; nothing is written."""
    manifest = bundle.manifest
    if change == PlanChange():
        return bundle
    plan = manifest.plan
    held = plan.one_pass or (plan.guidance is None and not plan.recipe)
    if change.strength is not None and held:
        only = plan.passes[0]
        raise UsageError(
            f"{bundle.root} starts at t = {only.encoder_timestep:g} alone, as its encoder was "
            "trained: it has one strength",
            "Leave --strength out.",
        )
    if held:
        raise UsageError(
            f"{bundle.root} is a distilled student: its steps are part of its weights and graphs",
            "Leave --steps, --key-steps, --inject and --max-decoder-rows out.",
        )
    config = bundle.json_object("scheduler/scheduler_config.json")
    changed = changed_plan(config, plan, change)
    return replace(bundle, manifest=replace(manifest, plan=changed))


def picture_to_follow(bundle: Bundle) -> UsageError:
    """The error where a bundle with a ControlNet is to draw and no picture was given."""
    return UsageError(
        f"{bundle.root} draws by a ControlNet and needs a picture to follow",
        "Pass --control PICTURE, or control=array in Python.",
    )


def check_steering(bundle: Bundle, guided: bool) -> None:
    """Refuse guidance (`guided`) or a negative prompt where guidance is distilled in."""
    if bundle.manifest.plan.guidance is None:
        raise UsageError(
            f"{bundle.root} is a distilled student: it takes no "
            f"{'guidance' if guided else 'negative prompt'}, its guidance is part of its weights",
            "Leave it out, or export the teacher with --method faster.",
        )


def _noise_shapes(noises: int, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes that given noise may have: a single one needs no axis of its own."""
    return ((noises, *shape), shape) if noises == 1 else ((noises, *shape),)
