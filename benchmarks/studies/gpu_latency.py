"""Time a student's UNet part in PyTorch on a GPU against 1-step and 4-step runs of the same UNet.

    python -m tiue_export.benchmarks.studies.gpu_latency --family sd21-base --out result.json

This is the reference that engines are held against: half precision, eager and as a CUDA graph, for
the naive, hoisted and merged decoder. Everything starts from noise and a text embedding and ends
with latents. All contenders of a batch are in memory together and run in turn (A B C A B C ...),
so that clocks and heat meet all alike. Weights do not change the time: without --ckpt they are
seeded random ones. `--device cpu --family tiny --runs 2` tries the script on any machine.

"one-step" and "four-step" are lowered as the student's graphs are (norms in float32, time folded);
"... diffusers" is the UNet as diffusers runs it. Neither uses guidance, as distilled models do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiue_export.bundle.folder import disk_errors
from tiue_export.checkpoint.family import family_names
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.graphs.build import ExportOptions, build_graphs, latent_shape, text_shape
from tiue_export.specs import UNET_GRAPHS
from tiue_export.student.load import load_student
from tiue_export.student.model import Student

from ..explained import run_explained
from ..synthetic import write_synthetic_pipeline

EAGER, CUDA_GRAPH = "eager", "CUDA graph"
_WARM_UP_RUNS = 5
_MERGE_BELOW = 0.02
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to latents: `run` computes them from fixed inputs; `rows` is its decoder's batch."""

    name: str
    what: str
    rows: int
    run: Run


@dataclass(frozen=True)
class Measured:
    """Latency of one contender at one batch, as it is and as a multiple of "four-step"'s."""

    contender: str
    mode: str
    batch: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    of_four_step: float
    latency_ms: tuple[float, ...]


def contenders(
    student: Student, batch: int, device: str, *, channels_last: bool
) -> list[Contender]:
    """Every way, on inputs of its own on `device`, in half precision."""
    single = _one_row(student)
    noise, text = _inputs(student, batch, device)
    ways = [
        ("TiUE naive", "each feature repeated K times", student, {"hoist": "none"}),
        ("TiUE hoisted", "what no timestep changes is computed once", student, {}),
        ("TiUE merged", "hoisted, rows of weight below 0.02 merged", student, _MERGED),
        ("one-step", "one pass, lowered like the above", single, {"hoist": "none"}),
    ]
    found = []
    for name, what, model, options in ways:
        run = _pair(model, options, batch, noise, text, device, channels_last)
        used = model.schedule.merged(_MERGE_BELOW) if options is _MERGED else model.schedule
        found.append(Contender(name, what, used.rows * batch, run))
    one_pass = found[-1].run
    found.append(Contender("four-step", "four such passes", batch, _repeated(one_pass, rows=4)))
    whole = _diffusers(student, noise, text, device, channels_last)
    found.append(Contender("one-step diffusers", "diffusers' own UNet", batch, whole))
    four = _repeated(whole, rows=4)
    found.append(Contender("four-step diffusers", "four such passes", batch, four))
    return found


_MERGED: dict[str, Any] = {"merge_below": _MERGE_BELOW}


def _one_row(student: Student) -> Student:
    """The student as an ordinary UNet cut in two: one timestep for both halves."""
    first = student.schedule
    single = copy.copy(student)
    single.schedule = replace(
        first,
        steps=1,
        timesteps=first.timesteps[:1],
        output_coefficients=first.output_coefficients[:1],
    )
    return single


def _inputs(student: Student, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Noise (B, 4, H, W) float32 and a text embedding (B, L, D) float16."""
    options = ExportOptions(precision="fp16", batch=batch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latent_shape(student, options), generator=generator)
    text = torch.randn(text_shape(student, options), generator=generator)
    return noise.to(device), text.to(device, torch.float16)


def _pair(
    student: Student,
    options: dict[str, Any],
    batch: int,
    noise: Tensor,
    text: Tensor,
    device: str,
    channels_last: bool,
) -> Run:
    """Encoder and decoder as the export makes them, fed by name."""
    asked = ExportOptions(precision="fp16", batch=batch, **options)
    graphs = build_graphs(student, asked, only=UNET_GRAPHS)
    modules = [_placed(graph.module, device, channels_last) for graph in graphs]
    specs = [graph.spec for graph in graphs]

    def run() -> Tensor:
        pool = {"sample": noise, "encoder_hidden_states": text}
        for module, spec in zip(modules, specs, strict=True):
            outputs = module(*(pool[tensor.name] for tensor in spec.inputs))
            pool.update(zip((t.name for t in spec.outputs), outputs, strict=True))
        return pool["latents"]

    return run


def _diffusers(
    student: Student, noise: Tensor, text: Tensor, device: str, channels_last: bool
) -> Run:
    unet = _placed(copy.deepcopy(student.unet).half(), device, channels_last)
    half = noise.half()
    # On the device already: a copy from the host cannot be captured.
    timestep = torch.tensor(student.schedule.timesteps[0], device=device)

    def run() -> Tensor:
        output: Tensor = unet(half, timestep, text, return_dict=False)[0]
        return output

    return run


def _repeated(one_pass: Run, rows: int) -> Run:
    def run() -> Tensor:
        for _ in range(rows):
            latents = one_pass()
        return latents

    return run


def _placed(module: Any, device: str, channels_last: bool) -> Any:
    module = module.eval().to(device)
    return module.to(memory_format=torch.channels_last) if channels_last else module


def captured(run: Run) -> Run:
    """The same work as one CUDA graph launch."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose and allocate in their first runs
        for _ in range(_WARM_UP_RUNS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents = run()

    def replay() -> Tensor:
        graph.replay()
        return latents

    return replay


def latency_ms(run: Run, device: str) -> float:
    """One run, by CUDA events on a GPU, by the clock elsewhere."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure(
    ways: Sequence[Contender], batch: int, mode: str, device: str, runs: int
) -> list[Measured]:
    """Run all in turn, `runs` times after a warm-up."""
    prepared = {way.name: captured(way.run) if mode == CUDA_GRAPH else way.run for way in ways}
    taken: dict[str, list[float]] = {name: [] for name in prepared}
    for number in range(_WARM_UP_RUNS + runs):
        for name, run in prepared.items():
            took_ms = latency_ms(run, device)
            if number >= _WARM_UP_RUNS:
                taken[name].append(took_ms)
    yardstick = statistics.median(taken["four-step"])
    return [
        Measured(
            contender=name,
            mode=mode,
            batch=batch,
            median_ms=round(statistics.median(times), 4),
            fastest_ms=round(min(times), 4),
            slowest_ms=round(max(times), 4),
            of_four_step=round(statistics.median(times) / yardstick, 4),
            latency_ms=tuple(round(each, 4) for each in times),
        )
        for name, times in taken.items()
    ]


def benchmark(
    student: Student, batches: Sequence[int], device: str, runs: int, *, channels_last: bool
) -> dict[str, Any]:
    """All contenders at all batches; what is written as JSON."""
    results: list[Measured] = []
    modes = [EAGER, CUDA_GRAPH] if device == "cuda" else [EAGER]
    described: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in batches:
            ways = contenders(student, batch, device, channels_last=channels_last)
            described += [
                {"batch": batch, "name": w.name, "what": w.what, "decoder_rows": w.rows}
                for w in ways
            ]
            for mode in modes:
                results += measure(ways, batch, mode, device, runs)
                for each in results[-len(ways) :]:
                    print(_line(each))
    return {
        "what": "noise and text embedding -> latents, PyTorch float16, median of runs in turn",
        "student": student.source.name,
        "family": student.source.family,
        "steps": student.schedule.steps,
        "runs": runs,
        "channels_last": channels_last,
        "torch": torch.__version__,
        "device": _device(device),
        "contenders": described,
        "results": [asdict(each) for each in results],
    }


def _line(each: Measured) -> str:
    return (
        f"batch {each.batch}  {each.mode:10}  {each.contender:20} {each.median_ms:10.2f} ms"
        f"  {each.of_four_step:6.2f} of four-step"
    )


def _device(device: str) -> dict[str, str | int | None]:
    if device != "cuda":
        return {"name": device, "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _student(arguments: argparse.Namespace) -> Student:
    if arguments.ckpt is not None:
        return load_student(arguments.ckpt, arguments.base, without=("text_encoder", "vae"))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Path(folder) / f"random-{arguments.family}"
        write_synthetic_pipeline(pipeline, arguments.family, dtype=torch.float16)
        student = load_student(pipeline, without=("text_encoder", "vae"))
        # Weights are mapped from the folder, which goes away.
        student.unet = copy.deepcopy(student.unet)
    return student


def _run(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeFailure(
            f"this torch ({torch.__version__}) finds no CUDA device",
            "Run it on a machine with a GPU, or try it with --device cpu --family tiny --runs 2.",
        )
    if arguments.runs < 1 or min(arguments.batch) < 1:
        raise UsageError("--runs and --batch must be 1 or more")
    torch.backends.cudnn.benchmark = True
    found = benchmark(
        _student(arguments),
        arguments.batch,
        arguments.device,
        arguments.runs,
        channels_last=arguments.channels_last,
    )
    if arguments.out is not None:
        with disk_errors(arguments.out):
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(arguments.out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print one line per contender, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ckpt", help="student; without it seeded random weights of --family")
    parser.add_argument("--base", help="pipeline folder for what the checkpoint lacks")
    parser.add_argument("--family", default="sd21-base", choices=family_names())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--channels-last", action="store_true", help="NHWC convolutions")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parsed = parser.parse_args(arguments)
    run_explained(lambda: _run(parsed))


if __name__ == "__main__":
    main()
