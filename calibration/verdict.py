"""Is the quantized bundle worth having? Both are run side by side, in one process, on this machine.

The latents of drawings that no range has seen are held against the float bundle's, and the graphs
are timed in turn, so that other work on the machine meets both alike. They are loaded as `generate`
loads them, before the clock starts; with little memory each for its turn alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.errors import ParityError, RegressionError
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.gates import max_abs_error, psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.proof.quantization import (
    ALONE,
    CONTENDER,
    SMALLER,
    TOGETHER,
    Verdict,
    VerdictOptions,
)
from tiue_export.proof.quantization_plan import (
    QuantizationPlan,
    gate_of,
    largest_losses,
)
from tiue_export.registry.backends import BACKENDS, open_runtime
from tiue_export.sampling.sampler import sample
from tiue_export.specs import (
    UNET_GRAPHS,
    Array,
    Feeds,
    Runtime,
    RuntimeOptions,
    check_finite,
)


def judge(
    base: Bundle,
    new: Bundle,
    plan: QuantizationPlan,
    data: CalibrationData,
    numbers: Sequence[int],
    options: VerdictOptions,
) -> Verdict:
    """Draw what was captured as `numbers` with each, then time the graphs, those of one kind open
    together, or in turn with `options.low_memory`.
    """
    contenders = _contenders(base, new, options)
    drawings = list(data.drawings(base, numbers))
    drawn: dict[str, Array] = {}
    for name in (next(iter(contenders)), CONTENDER):
        bundle, runtime_options = contenders[name]
        runtime = open_runtime(options.runtime, bundle, runtime_options)
        try:
            drawn[name] = _latents(bundle, runtime, drawings)
            title = f"{runtime.name} {runtime.device}"
        finally:
            runtime.close()
    reference, latents = drawn.values()
    runs = list(data.runs(data.drawing_runs(numbers[0])))
    latency_ms: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for graph in UNET_GRAPHS:
        for name, value in _time(contenders, graph, runs, options).items():
            latency_ms[name][graph] = round(value, 3)
    for times in latency_ms.values():
        times["unet"] = round(sum(times.values()), 3)
    floats = [times["unet"] for name, times in latency_ms.items() if name != CONTENDER]
    kinds = {new.manifest.graphs[graph].precision for graph in UNET_GRAPHS}
    gate = gate_of(kinds) if options.gate_psnr_db is None else options.gate_psnr_db
    psnr = psnr_db(reference, latents)
    return Verdict(
        runtime=title,
        inputs=f"{len(numbers) * data.index.batch} captured prompts held out of the ranges",
        latents_psnr_db=round(psnr, 2),
        max_abs_error=max_abs_error(reference, latents),
        gate_psnr_db=gate,
        loading=ALONE if options.low_memory else TOGETHER,
        latency_ms=latency_ms,
        speed_ratio=round(min(floats) / latency_ms[CONTENDER]["unet"], 4),
        size_bytes={
            "float": _size_bytes(base, options.runtime),
            CONTENDER: _size_bytes(new, options.runtime),
        },
        int8_share=round(plan.int8_share, 4),
        must_be=options.must_be,
        blame=tuple(largest_losses(plan)),
    )


def require_worth(verdict: Verdict, *, allow_loss: bool, allow_slower: bool) -> None:
    """Raise what is wrong with the result, with the layers or graphs to blame."""
    if not verdict.accurate and not allow_loss:
        blame = "; ".join(verdict.blame) or "no single layer was measured: --sensitivity layer"
        raise ParityError(
            f"the latents of the quantized bundle have {verdict.latents_psnr_db:.1f} dB, gate "
            f"{verdict.gate_psnr_db:.0f} dB; what costs most: {blame}",
            "Raise --target-psnr or set those layers to float in the plan; or accept it: "
            "--allow-parity-loss.",
        )
    if not verdict.worth_it and not allow_slower:
        if verdict.must_be == SMALLER:
            raise RegressionError("the quantized UNet is not smaller than the float one")
        raise RegressionError(
            f"the quantized UNet is not faster on {verdict.runtime}: {_slow_graphs(verdict)}",
            "Judge on the runtime you will use (--runtime openvino), or for another device leave "
            "speed out: --any-speed.",
        )


def with_parity(manifest: Manifest, verdict: Verdict) -> Manifest:
    """The manifest with the verdict's parity, and whether a loss was accepted."""
    record = ParityRecord(
        hop=f"quantized {verdict.runtime}",
        subject="latents",
        metric="psnr_db",
        value=verdict.latents_psnr_db,
        gate=verdict.gate_psnr_db,
        max_abs_error=verdict.max_abs_error,
        inputs=verdict.inputs,
    )
    return replace(manifest, parity=(record,), parity_loss_allowed=not record.passed)


def _contenders(
    base: Bundle, new: Bundle, options: VerdictOptions
) -> dict[str, tuple[Bundle, RuntimeOptions]]:
    """Name -> bundle and how to open it; the first is the reference, in its finest arithmetic."""
    plain = RuntimeOptions(
        device=options.device,
        threads=options.threads,
        precision=options.precision,
        low_memory=options.low_memory,
    )
    if not BACKENDS[options.runtime].chooses_precision:
        return {"float": (base, plain), CONTENDER: (new, plain)}
    plain = replace(plain, precision=_chosen_precision(base, options.runtime, plain))
    found = {
        f"float {precision}": (base, replace(plain, precision=precision))
        for precision in dict.fromkeys(("fp32", plain.precision))
    }
    found[CONTENDER] = (new, plain)
    return found


def _chosen_precision(bundle: Bundle, runtime: str, options: RuntimeOptions) -> str:
    """What "auto" stands for on this device: it may be fp32, which needs no second contender."""
    opened = open_runtime(runtime, bundle, options)
    try:
        return opened.precision
    finally:
        opened.close()


def _latents(bundle: Bundle, runtime: Runtime, drawings: Sequence[tuple[Array, Array]]) -> Array:
    """Whole drawings, so that a bundle goes on with what it made itself in earlier passes."""

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        outputs = runtime.run(graph, with_dtypes(bundle.spec(graph), pool))
        check_finite(graph, outputs)
        return outputs

    plan = bundle.manifest.plan
    return np.concatenate([sample(plan, run, noises, text) for noises, text in drawings])


def _time(
    contenders: Mapping[str, tuple[Bundle, RuntimeOptions]],
    graph: str,
    runs: Sequence[Feeds],
    options: VerdictOptions,
) -> dict[str, float]:
    """Median milliseconds of a graph in all runs of one drawing, the contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    feeds = {
        name: [with_dtypes(bundle.spec(graph), run) for run in runs]
        for name, (bundle, _) in contenders.items()
    }

    def loaded(name: str) -> AbstractContextManager[Runtime]:
        return _loaded(*contenders[name], options.runtime, graph, feeds[name][0])

    with ExitStack() as together:
        kept = {}
        if not options.low_memory:
            kept = {name: together.enter_context(loaded(name)) for name in contenders}
        for _ in range(options.rounds):
            for name in contenders:
                with nullcontext(kept[name]) if kept else loaded(name) as runtime:
                    start = time.perf_counter()
                    for one in feeds[name]:
                        runtime.run(graph, one)
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


@contextmanager
def _loaded(
    bundle: Bundle, options: RuntimeOptions, runtime_name: str, graph: str, feeds: Feeds
) -> Iterator[Runtime]:
    """A runtime that keeps the graph, and has run it once: backends load lazily.

    `low_memory` would have some load a graph for each run, and that is not what is timed.
    """
    runtime = open_runtime(runtime_name, bundle, replace(options, low_memory=False))
    try:
        runtime.run(graph, feeds)
        yield runtime
    finally:
        runtime.close()


def _size_bytes(bundle: Bundle, runtime: str) -> int:
    compiled = bundle.manifest.compiled.get(runtime)
    graphs: Mapping[str, Any] = bundle.manifest.graphs if compiled is None else compiled.graphs
    return sum(f.size_bytes for graph in UNET_GRAPHS for f in graphs[graph].files.values())


def _slow_graphs(verdict: Verdict) -> str:
    """Each graph's time, float and quantized."""
    parts = []
    for graph in UNET_GRAPHS:
        floats = min(t[graph] for name, t in verdict.latency_ms.items() if name != CONTENDER)
        parts.append(f"{graph} {floats:.1f} -> {verdict.latency_ms[CONTENDER][graph]:.1f} ms")
    return ", ".join(parts)
