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
from typing import Any, NamedTuple

import numpy as np

from tiue_export.bundle.chain import TOKENS
from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.tokenizer import tokenizer_of_bundle
from tiue_export.errors import ParityError, RegressionError
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.gates import max_abs_error, psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.proof.quantization import (
    ALONE,
    CONTENDER,
    SMALLER,
    TOGETHER,
    Loss,
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
    RUNNING_ORDER,
    TEXT_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    Array,
    Feeds,
    Runtime,
    RuntimeOptions,
    check_finite,
)

from .capture import drawing_tokens
from .parts import vae_feeds


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
    graphs = [name for name in RUNNING_ORDER if plan.kind(name)]
    drawn: dict[str, _Drawn] = {}
    latents: Array | None = None
    for name in (next(iter(contenders)), CONTENDER):
        bundle, runtime_options = contenders[name]
        runtime = open_runtime(options.runtime, bundle, runtime_options)
        try:
            drawn[name] = _draw(bundle, runtime, data, numbers, graphs, latents)
            latents = drawn[name].latents
            title = f"{runtime.name} {runtime.device}"
        finally:
            runtime.close()
    reference, quantized = drawn.values()
    latency_ms: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for graph in graphs:
        runs = list(_runs(base, data, numbers[0], graph, reference.latents))
        for name, value in _time(contenders, graph, runs, options).items():
            latency_ms[name][graph] = round(value, 3)
    for times in latency_ms.values():
        total = round(sum(times.values()), 3)
        if set(UNET_GRAPHS) & times.keys():
            times["unet"] = round(sum(times.get(graph, 0.0) for graph in UNET_GRAPHS), 3)
        times["all"] = total
    floats = [times["all"] for name, times in latency_ms.items() if name != CONTENDER]
    # The VAE has no part in the latents; with no other graph quantized they have no gate to miss.
    kinds = {name: new.manifest.graphs[name].precision for name in graphs}
    vae_kind = kinds.pop(VAE_DECODER, None)
    gate = gate_of(kinds.values()) if kinds else 0.0
    gate = gate if options.gate_psnr_db is None else options.gate_psnr_db
    psnr = psnr_db(reference.latents, quantized.latents)
    pictures = None
    if vae_kind is not None and reference.pictures is not None and quantized.pictures is not None:
        pictures = Loss(
            round(psnr_db(reference.pictures, quantized.pictures), 2),
            max_abs_error(reference.pictures, quantized.pictures),
            gate_of([vae_kind]),
        )
    return Verdict(
        runtime=title,
        inputs=f"{len(numbers) * data.index.batch} captured prompts held out of the ranges",
        latents_psnr_db=round(psnr, 2),
        max_abs_error=max_abs_error(reference.latents, quantized.latents),
        gate_psnr_db=gate,
        loading=ALONE if options.low_memory else TOGETHER,
        latency_ms=latency_ms,
        speed_ratio=round(min(floats) / latency_ms[CONTENDER]["all"], 4),
        size_bytes={
            "float": _size_bytes(base, options.runtime, graphs),
            CONTENDER: _size_bytes(new, options.runtime, graphs),
        },
        int8_share=round(plan.int8_share, 4),
        must_be=options.must_be,
        blame=(*largest_losses(plan, UNET_GRAPHS), *largest_losses(plan, (VAE_DECODER,))),
        pictures=pictures,
    )


def require_worth(verdict: Verdict, *, allow_loss: bool, allow_slower: bool) -> None:
    """Raise what is wrong with the result, with the layers or graphs to blame."""
    if not verdict.accurate and not allow_loss:
        what, psnr_db, gate_db = "latents", verdict.latents_psnr_db, verdict.gate_psnr_db
        if (pictures := verdict.pictures) is not None and not pictures.passed:
            what, psnr_db, gate_db = "pictures", pictures.psnr_db, pictures.gate_psnr_db
        own = [entry for entry in verdict.blame if (what == "pictures") == _is_of_vae(entry)]
        blame = "; ".join(own) or "no single layer was measured: --sensitivity layer"
        raise ParityError(
            f"the {what} of the quantized bundle have {psnr_db:.1f} dB, gate {gate_db:.0f} dB; "
            f"what costs most: {blame}",
            "Raise --target-psnr or set those layers to float in the plan; or accept it: "
            "--allow-parity-loss.",
        )
    if not verdict.worth_it and not allow_slower:
        if verdict.must_be == SMALLER:
            raise RegressionError("the quantized graphs are not smaller than the float ones")
        raise RegressionError(
            f"the quantized graphs are not faster on {verdict.runtime}: {_slow_graphs(verdict)}",
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
    records = [record]
    if (pictures := verdict.pictures) is not None:
        records.append(
            replace(
                record,
                subject="picture / float VAE",
                value=pictures.psnr_db,
                gate=pictures.gate_psnr_db,
                max_abs_error=pictures.max_abs_error,
            )
        )
    allowed = not all(each.passed for each in records)
    return replace(manifest, parity=tuple(records), parity_loss_allowed=allowed)


def _is_of_vae(loss: str) -> bool:
    return loss.startswith(f"{VAE_DECODER}/")


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


class _Drawn(NamedTuple):
    """Latents (N, 4, H, W) of all drawings, and, of a VAE that is quantized, their pictures."""

    latents: Array
    pictures: Array | None


def _draw(
    bundle: Bundle,
    runtime: Runtime,
    data: CalibrationData,
    numbers: Sequence[int],
    graphs: Sequence[str],
    float_latents: Array | None,
) -> _Drawn:
    """Whole drawings, so that a bundle goes on with what it made itself in earlier passes.

    Pictures are of `float_latents`, or of these where there are none yet: the VAE's own loss.
    """

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        outputs = runtime.run(graph, with_dtypes(bundle.spec(graph), pool))
        check_finite(graph, outputs)
        return outputs

    plan, drawn = bundle.manifest.plan, []
    for number, (noises, text) in zip(numbers, data.drawings(bundle, numbers), strict=True):
        if TEXT_ENCODER in graphs:
            tokens = drawing_tokens(tokenizer_of_bundle(bundle), data.index, number)
            (text,) = run(TEXT_ENCODER, {TOKENS: tokens}).values()
        drawn.append(sample(plan, run, noises, text.astype(np.float32)))
    latents = np.concatenate(drawn)
    if VAE_DECODER not in graphs:
        return _Drawn(latents, None)
    source = latents if float_latents is None else float_latents
    pictures = []
    for one in np.split(source, len(numbers)):
        for feeds in vae_feeds(bundle, one):
            pictures.append(next(iter(run(VAE_DECODER, feeds).values())))
    return _Drawn(latents, np.concatenate(pictures))


def _runs(
    bundle: Bundle, data: CalibrationData, number: int, graph: str, latents: Array
) -> Iterator[Feeds]:
    """What a graph is fed in the first of the drawings that `latents` are of."""
    if graph == TEXT_ENCODER:
        yield {TOKENS: drawing_tokens(tokenizer_of_bundle(bundle), data.index, number)}
    elif graph == VAE_DECODER:
        yield from vae_feeds(bundle, latents[: data.index.batch])
    else:
        yield from data.runs(data.drawing_runs(number))


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


def _size_bytes(bundle: Bundle, runtime: str, names: Sequence[str]) -> int:
    compiled = bundle.manifest.compiled.get(runtime)
    graphs: Mapping[str, Any] = bundle.manifest.graphs if compiled is None else compiled.graphs
    return sum(f.size_bytes for name in names for f in graphs[name].files.values())


def _slow_graphs(verdict: Verdict) -> str:
    """Each graph's time, float and quantized."""
    parts = []
    for graph in (name for name in RUNNING_ORDER if name in verdict.latency_ms[CONTENDER]):
        floats = min(t[graph] for name, t in verdict.latency_ms.items() if name != CONTENDER)
        parts.append(f"{graph} {floats:.1f} -> {verdict.latency_ms[CONTENDER][graph]:.1f} ms")
    return ", ".join(parts)
