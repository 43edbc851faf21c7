"""Is the quantized bundle worth having? Both are run side by side, in one process, on this machine.

The latents of runs that no range has seen are held against the float bundle's, and the graphs are
timed in turn, so that other work on the machine meets both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.errors import ParityError, RegressionError
from tiue_export.proof.calibration import CalibrationData
from tiue_export.proof.gates import max_abs_error, psnr_db
from tiue_export.proof.parity import with_dtypes
from tiue_export.proof.quantization import CONTENDER, SMALLER, Verdict, VerdictOptions
from tiue_export.proof.quantization_plan import (
    QuantizationPlan,
    gate_of,
    largest_losses,
)
from tiue_export.registry.backends import BACKENDS, open_runtime
from tiue_export.specs import (
    BATCH,
    UNET_DECODER,
    UNET_GRAPHS,
    Array,
    Runtime,
    RuntimeOptions,
    axis_size,
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
    """Run both on captured runs, graph by graph; the graphs of one kind are open together."""
    contenders = _contenders(base, new, options)
    pools: dict[str, list[dict[str, Array]]] = {
        name: [dict(run) for run in data.runs(numbers)] for name in contenders
    }
    latency_ms: dict[str, dict[str, float]] = {name: {} for name in contenders}
    titles: dict[str, str] = {}
    for graph in UNET_GRAPHS:
        runtimes = {
            name: open_runtime(options.runtime, bundle, runtime_options)
            for name, (bundle, runtime_options) in contenders.items()
        }
        try:
            for name, runtime in runtimes.items():
                _run_all(contenders[name][0], graph, runtime, pools[name])
                titles[name] = f"{runtime.name} {runtime.device}"
            for name, value in _time(contenders, graph, runtimes, options.rounds).items():
                latency_ms[name][graph] = round(value, 3)
        finally:
            for runtime in runtimes.values():
                runtime.close()
    reference, latents = (
        np.concatenate([pool["latents"] for pool in pools[name]])
        for name in (next(iter(contenders)), CONTENDER)
    )
    for times in latency_ms.values():
        times["unet"] = round(sum(times.values()), 3)
    floats = [times["unet"] for name, times in latency_ms.items() if name != CONTENDER]
    kinds = {new.manifest.graphs[graph].precision for graph in UNET_GRAPHS}
    gate = gate_of(kinds) if options.gate_psnr_db is None else options.gate_psnr_db
    psnr = psnr_db(reference, latents)
    return Verdict(
        runtime=titles[CONTENDER],
        inputs=f"{len(numbers) * data.index.batch} captured prompts held out of the ranges",
        latents_psnr_db=round(psnr, 2),
        max_abs_error=max_abs_error(reference, latents),
        gate_psnr_db=gate,
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


def _run_all(bundle: Bundle, graph: str, runtime: Runtime, pool: list[dict[str, Array]]) -> None:
    """Each contender goes on with the features that it made itself."""
    for run in pool:
        outputs = runtime.run(graph, with_dtypes(bundle.spec(graph), run))
        check_finite(graph, outputs)
        if graph == UNET_DECODER:
            run.clear()
        run.update({name: np.array(array, np.float32) for name, array in outputs.items()})


def _time(
    contenders: Mapping[str, tuple[Bundle, RuntimeOptions]],
    graph: str,
    runtimes: Mapping[str, Runtime],
    rounds: int,
) -> dict[str, float]:
    """Median milliseconds of one run, the contenders taking turns; values do not matter to it."""
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    feeds = {}
    for name, (bundle, _) in contenders.items():
        random, sizes = np.random.RandomState(0), {BATCH: 1}
        feeds[name] = {
            tensor.name: random.standard_normal(
                [axis_size(side, sizes) for side in tensor.shape]
            ).astype(tensor.dtype)
            for tensor in bundle.spec(graph).inputs
        }
    for _ in range(rounds):
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime.run(graph, feeds[name])
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


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
