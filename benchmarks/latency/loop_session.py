"""A model in several passes on one of its runtimes, as a contender.

A few-step student is drawn whole. Faster Diffusion's loop repeats a few kinds of runs, the encoder
at key steps, the decoder on groups of some sizes: a drawing makes each kind once and counts it as
often as the loop would; the loop's own sums, some microseconds in numpy, are left out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.drawing.pipeline import replanned
from tiue_export.drawing.vae_tiles import decode_in_tiles, tile_size
from tiue_export.proof.latency_record import END_TO_END, Facts
from tiue_export.proof.parity import load_reference, with_dtypes
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.sampling.sampler import pieces, sample
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    Array,
    RuntimeOptions,
    check_finite,
    step_limit,
)

from .graph_session import check_parts, runtime_versions
from .session import StageClock
from .settings import LoopSettings

# How the same graphs are looped over; the first is what the bundle itself does.
LOOPS: Mapping[str, str] = {
    "plan": "groups as one batch",
    "sequential": "the same key steps, one decoder step at a time",
    "every-step": "ordinary sampling, encoder and decoder at every step",
}


@dataclass(frozen=True)
class LoopRuns:
    """How often a drawing runs the encoder, and the decoder by the number of steps it gets."""

    encoder: int
    decoder: Mapping[int, int]


def loop_runs(plan: Plan, loop: str, batch: int) -> LoopRuns:
    """What one drawing of `batch` pictures runs."""
    steps = sum(group.rows for group in plan.passes)
    if loop == "every-step":
        return LoopRuns(steps, {1: steps})
    if loop == "sequential":
        return LoopRuns(len(plan.passes), {1: steps})
    sizes = Counter(
        len(piece)
        for group in plan.passes
        for piece in pieces(group, plan.max_decoder_rows, plan.copies * batch)
    )
    return LoopRuns(len(plan.passes), dict(sorted(sizes.items())))


class LoopSession:
    """An opened runtime and ready inputs; `run` is one drawing."""

    def __init__(self, settings: LoopSettings) -> None:
        self._settings = settings
        change = PlanChange(max_decoder_rows=settings.max_decoder_rows)
        self._bundle = replanned(open_bundle(str(settings.bundle)), change)
        if not settings.unet_only:
            check_parts(self._bundle)
        options = RuntimeOptions(
            device=settings.device, threads=settings.threads, precision=settings.precision
        )
        self._runtime = open_runtime(settings.runtime, self._bundle, options)
        self._known = _inputs(self._bundle)
        batch = len(self._known["noise"])
        plan = plan_of(self._bundle)
        plan = self._plan = plan.bounded(step_limit(self._runtime), plan.copies * batch)
        self._runs = loop_runs(plan, settings.loop, batch)

    @property
    def facts(self) -> Facts:
        """Known once everything has run: devices may be chosen late."""
        manifest, settings = self._bundle.manifest, self._settings
        sizes = ", ".join(map(str, self._runs.decoder))
        return Facts(
            device=self._runtime.device,
            precision=(
                self._runtime.precision if settings.precision == "auto" else settings.precision
            ),
            versions=runtime_versions(settings.runtime),
            size_px=(manifest.width_px, manifest.height_px),
            batch=len(self._known["noise"]),
            threads=settings.threads,
            weights_sha256=manifest.source.sha256,
            text_tokens=manifest.text_tokens,
            notes=()
            if self._plan.recipe
            else (
                f"timed once and scaled: the encoder to {self._runs.encoder} runs, the decoder "
                f"for groups of {sizes} steps to {sum(self._runs.decoder.values())} runs",
            ),
        )

    def run(self) -> dict[str, float]:
        """One drawing; milliseconds by stage."""
        clock = StageClock()
        if not self._settings.unet_only:
            # The prompt's, and with guidance the negative prompt's, which takes as long.
            for _ in range(self._plan.copies):
                self._timed(clock, TEXT_ENCODER, self._known)
        if self._plan.recipe:
            self._sample(clock)
        else:
            self._scaled_loop(clock)
        if not self._settings.unet_only:
            self._decode(clock)
        return clock.latency_ms(whole=None if self._settings.unet_only else END_TO_END)

    def _sample(self, clock: StageClock) -> None:
        """Every pass, with the sums between them."""
        noises, known = self._known["noise"][None], self._known
        if self._plan.noises > 1:
            noises = np.concatenate([noises, known["fresh_noise"]])

        def run(graph: str, pool: Mapping[str, Array]) -> dict[str, Array]:
            return self._timed(clock, graph, with_dtypes(self._bundle.spec(graph), pool))

        start, timed_s = time.perf_counter(), clock.whole_s
        latents = sample(self._plan, run, noises, known["encoder_hidden_states"])
        check_finite("the drawing", {"latents": latents})
        clock.whole_s = timed_s + time.perf_counter() - start

    def _scaled_loop(self, clock: StageClock) -> None:
        """Each kind of run once, counted as often as the loop makes it."""
        features = self._timed(clock, UNET_ENCODER, self._known, times=self._runs.encoder)
        last = self._known["timesteps"][-1:]
        for steps, times in self._runs.decoder.items():
            feeds = {**self._known, **features, "timesteps": np.repeat(last, steps)}
            outputs = self._timed(clock, UNET_DECODER, feeds, times=times)
            check_finite("the drawing", outputs)

    def count(self) -> dict[str, float]:
        """Nothing: graphs are counted from their files (`flops.py`), not by running them."""
        return {}

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()

    def _timed(
        self, clock: StageClock, graph: str, pool: Mapping[str, Array], times: int = 1
    ) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self._runtime.run(graph, self._bundle.spec(graph).select(pool))
        seconds = (time.perf_counter() - start) * times
        clock.add(graph, seconds)
        clock.whole_s += seconds
        return outputs

    def _decode(self, clock: StageClock) -> None:
        """The VAE decoder on the reference's latents, whole or in tiles."""
        start = time.perf_counter()
        scaled = self._known["latents"] / self._bundle.manifest.vae_scaling_factor
        spec = self._bundle.spec(VAE_DECODER)

        def decode(latents: Array) -> Array:
            feeds = spec.select({"latent_sample": latents})
            return self._runtime.run(VAE_DECODER, feeds)["sample"]

        picture = decode_in_tiles(decode, scaled.astype(np.float32), tile_size(spec))
        check_finite("the drawing", {"sample": picture})
        seconds = time.perf_counter() - start
        clock.add(VAE_DECODER, seconds)
        clock.whole_s += seconds


def _inputs(bundle: Bundle) -> dict[str, Array]:
    """The reference's arrays, inputs in the dtypes that the graphs take."""
    known: dict[str, Array] = dict(load_reference(bundle).arrays)
    for graph in bundle.manifest.graphs:
        for tensor in bundle.spec(graph).inputs:
            if tensor.name in known:
                known[tensor.name] = known[tensor.name].astype(tensor.dtype)
    return known


def plan_of(bundle: Bundle) -> Plan:
    """The plan of a bundle that was exported with one."""
    plan = bundle.manifest.plan
    assert plan is not None, "contenders.py opens this session for bundles with a plan"
    return plan
