"""Prompt to picture on any runtime: tokens, text, one encoder pass, one decoder pass, VAE.

Needs numpy, tokenizers and pillow; the runtime brings the rest. It knows graph names and specs,
never a backend; tensors travel between graphs by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiue_export.bundle import Bundle, open_bundle
from tiue_export.errors import UsageError
from tiue_export.noise import check_seeds, noise_from_seed
from tiue_export.picture import image_from_pixels, pixels_from_sample
from tiue_export.registry import open_runtime
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    Array,
    BatchLimited,
    ChainRuntime,
    Runtime,
    RuntimeOptions,
    check_finite,
)
from tiue_export.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One generated image with what made it; `seed` None when the noise was given.

    `latents` (4, H, W) float32, before the VAE.
    """

    image: Image
    prompt: str
    seed: int | None
    latents: Array


@dataclass(frozen=True)
class Result:
    """Pictures in request order (prompt by prompt, seed by seed), and time per stage and run."""

    pictures: list[Picture]
    stage_latency_ms: Mapping[str, list[float]]

    @property
    def images(self) -> list[Image]:
        return [picture.image for picture in self.pictures]


@dataclass(frozen=True)
class Pipeline:
    """An opened bundle on an opened runtime. Use it as a context manager, or close it.

    >>> with Pipeline.open("bundle") as pipeline:          # doctest: +SKIP
    ...     pipeline("a red fox", seed=0).images[0].save("fox.png")
    """

    bundle: Bundle
    runtime: Runtime
    tokenizer: Tokenizer
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
        length = int(opened.manifest.text_shape[1])
        tokenizer = open_tokenizer(opened.file("tokenizer/tokenizer.json"), length)
        if isinstance(runtime, str):
            runtime = open_runtime(runtime, opened, options or RuntimeOptions())
        return Pipeline(opened, runtime, tokenizer)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        count: int = 1,
        latents: Array | None = None,
        on_picture: Callable[[Picture], None] = lambda picture: None,
    ) -> Result:
        """Draw `count` pictures of each prompt; picture i of a prompt uses seed + i.

        `latents` (4, H, W) or (1, 4, H, W) float32 replaces the seeded noise of every picture;
        it must then be one picture per prompt. `on_picture` is called as each is finished.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UsageError("no prompt was given")
        if count < 1:
            raise UsageError(f"count is {count}; expected 1 or more")
        if latents is not None and count != 1:
            raise UsageError("latents fix the noise, so count must be 1")
        shape = tuple(int(side) for side in self.bundle.manifest.latent_shape[1:])
        if latents is not None and latents.shape not in (shape, (1, *shape)):
            raise UsageError(f"latents have shape {latents.shape}; expected {(1, *shape)}")
        check_seeds(seed, count)
        jobs = [(text, seed + i) for text in prompts for i in range(count)]
        smallest, largest = self._batch_range()
        pictures: list[Picture] = []
        stages: dict[str, list[float]] = {}
        for start in range(0, len(jobs), largest):
            chunk = jobs[start : start + largest]
            for picture in self._draw(chunk, max(smallest, len(chunk)), latents, stages):
                on_picture(picture)
                pictures.append(picture)
        return Result(pictures, stages)

    def _batch_range(self) -> tuple[int, int]:
        """The smallest and largest batch to run: the bundle's, or a dynamic one within limits."""
        batch = self.bundle.manifest.batch
        if batch is not None:
            return batch, batch
        if not isinstance(self.runtime, BatchLimited):
            return 1, _DYNAMIC_BATCH
        smallest, largest = self.runtime.batch_range()
        return smallest, max(smallest, min(largest, _DYNAMIC_BATCH))

    def _draw(
        self,
        jobs: list[tuple[str, int]],
        size: int,
        latents: Array | None,
        stages: dict[str, list[float]],
    ) -> list[Picture]:
        """One run of all graphs; a static batch is filled up by repeating the last job."""
        filled = jobs + [jobs[-1]] * (size - len(jobs))
        shape = tuple(int(side) for side in self.bundle.manifest.latent_shape[1:])
        if latents is None:
            rows = [noise_from_seed(seed, (1, *shape)) for _, seed in filled]
        else:
            rows = [latents.astype(np.float32).reshape(1, *shape)] * len(filled)
        result, sample = self._run_all(
            [prompt for prompt, _ in filled], np.concatenate(rows), stages
        )
        pixels = pixels_from_sample(sample)
        return [
            Picture(
                image_from_pixels(pixels[row]),
                prompt,
                seed if latents is None else None,
                result[row],
            )
            for row, (prompt, seed) in enumerate(jobs)
        ]

    def _run_all(
        self, prompts: list[str], noise: Array, stages: dict[str, list[float]]
    ) -> tuple[Array, Array]:
        """Latents (B, 4, H, W) and picture (B, 3, 8H, 8W), in one go where the runtime can."""
        if isinstance(self.runtime, ChainRuntime):
            chained = self.runtime.run_chain(self.tokenizer(prompts), noise)
            if chained is not None:
                for stage, latency_ms in chained.stage_latency_ms.items():
                    stages.setdefault(stage, []).append(latency_ms)
                return chained.latents, chained.picture
        latents = self.latents_from_noise(noise, self.embed(prompts, stages), stages)
        return latents, self.decode(latents, stages)

    def embed(self, prompts: Sequence[str], stages: dict[str, list[float]] | None = None) -> Array:
        """Prompts -> text embedding (B, L, D)."""
        feeds = {"input_ids": self.tokenizer(prompts)}
        return self._run(TEXT_ENCODER, feeds, stages)["last_hidden_state"]

    def latents_from_noise(
        self, noise: Array, text: Array, stages: dict[str, list[float]] | None = None
    ) -> Array:
        """Noise (B, 4, H, W) and text (B, L, D) -> latents, by encoder and decoder."""
        pool = {"sample": noise, "encoder_hidden_states": text}
        pool.update(self._run(UNET_ENCODER, pool, stages))
        return self._run(UNET_DECODER, pool, stages)["latents"]

    def decode(self, latents: Array, stages: dict[str, list[float]] | None = None) -> Array:
        """Latents (B, 4, H, W) -> picture (B, 3, 8H, 8W), about [-1, 1]."""
        scaled = (latents / self.bundle.manifest.vae_scaling_factor).astype(np.float32)
        return self._run(VAE_DECODER, {"latent_sample": scaled}, stages)["sample"]

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


_DYNAMIC_BATCH = 4
