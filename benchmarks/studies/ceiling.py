"""How fast this machine can compute at all: large convolutions and matrix products, timed alone.

    python -m tiue_export.benchmarks.studies.ceiling

The best of what is installed (OpenVINO, PyTorch, NumPy) counts as the ceiling of a precision; a
model reaches a share of it. Both operations are of sizes that the UNet has.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiue_export.errors import RuntimeFailure, UsageError, first_line
from tiue_export.proof.latency_record import Ceiling
from tiue_export.registry.spokes import run_explained
from tiue_export.system.child_process import child_command
from tiue_export.system.openvino_core import import_openvino, openvino_core

_ROWS, _CHANNELS, _SIDE = 4, 640, 32  # a 3x3 convolution of the middle resolution, K = 4 rows
_MATRIX = 2048
_CONV_FLOPS = 2 * _ROWS * _SIDE**2 * _CHANNELS**2 * 9
_MATRIX_FLOPS = 2 * _MATRIX**3
_SECONDS = 0.6
_OPENVINO_TYPES = {"fp32": "f32", "bf16": "bf16"}


@dataclass(frozen=True)
class Trial:
    """One operation of one library: `run` is timed, after a warm-up."""

    precision: str
    name: str
    flops: int
    run: Callable[[], object]


def measure_ceilings(threads: int | None, seconds: float = _SECONDS) -> dict[str, Ceiling]:
    """The best of all trials by precision, in TFLOP/s; about `seconds` are spent on each."""
    best: dict[str, Ceiling] = {}
    for trial in _trials(threads):
        tflops = trial.flops / _best_s(trial.run, seconds) / 1e12
        if trial.precision not in best or tflops > best[trial.precision].tflops:
            best[trial.precision] = Ceiling(round(tflops, 4), trial.name)
    return best


def ceilings_in_child(threads: int | None) -> dict[str, Ceiling]:
    """`measure_ceilings` in a process of its own, so that nothing of it stays behind."""
    command = child_command("tiue_export.benchmarks.studies.ceiling", "--json")
    if threads is not None:
        command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeFailure(f"the machine's ceiling could not be measured: {said}")
    found: Mapping[str, Any] = json.loads(done.stdout)
    return {name: Ceiling(**values) for name, values in found.items()}


def parse_ceilings(given: tuple[str, ...]) -> dict[str, Ceiling]:
    """`--peak bf16=1.1` and the like, in TFLOP/s."""
    found = {}
    for text in given:
        precision, _, value = text.partition("=")
        try:
            tflops = float(value)
        except ValueError:
            tflops = 0.0
        if not precision or not 0 < tflops < float("inf"):
            raise UsageError(
                f"--peak is {text!r}; expected PRECISION=TFLOPS, such as --peak bf16=1.1"
            )
        found[precision] = Ceiling(tflops, "given with --peak")
    return found


def _trials(threads: int | None) -> Iterator[Trial]:
    left = np.random.RandomState(0).rand(_MATRIX, _MATRIX).astype(np.float32)
    yield Trial("fp32", "NumPy, matrix product", _MATRIX_FLOPS, lambda: left @ left)
    if importlib.util.find_spec("torch") is not None:
        yield from _torch_trials(threads)
    if importlib.util.find_spec("openvino") is not None:
        yield from _openvino_trials(threads)


def _torch_trials(threads: int | None) -> Iterator[Trial]:
    import torch

    from tiue_export.train.cpu_precision import has_native_bf16

    if threads is not None:
        torch.set_num_threads(threads)
    dtypes = {"fp32": torch.float32}
    if has_native_bf16():  # its reference kernel takes minutes, and is no ceiling of anything
        dtypes["bf16"] = torch.bfloat16
    for precision, dtype in dtypes.items():
        image = torch.rand(_ROWS, _CHANNELS, _SIDE, _SIDE, dtype=dtype)
        image = image.to(memory_format=torch.channels_last)
        weights = torch.rand(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype)
        weights = weights.to(memory_format=torch.channels_last)
        matrix = torch.rand(_MATRIX, _MATRIX, dtype=dtype)

        def convolve(image: torch.Tensor = image, weights: torch.Tensor = weights) -> object:
            with torch.inference_mode():
                return torch.conv2d(image, weights, padding=1)

        def multiply(matrix: torch.Tensor = matrix) -> object:
            with torch.inference_mode():
                return matrix @ matrix

        yield Trial(precision, f"PyTorch, {precision} 3x3 convolution", _CONV_FLOPS, convolve)
        yield Trial(precision, f"PyTorch, {precision} matrix product", _MATRIX_FLOPS, multiply)


def _openvino_trials(threads: int | None) -> Iterator[Trial]:
    openvino = import_openvino()
    operations = openvino.opset13

    core = openvino_core()
    native = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    random = np.random.RandomState(0)
    kernel = random.rand(_CHANNELS, _CHANNELS, 3, 3).astype(np.float32)
    image = operations.parameter([_ROWS, _CHANNELS, _SIDE, _SIDE], np.float32)
    matrix = operations.parameter([_MATRIX, _MATRIX], np.float32)
    factor = operations.constant(random.rand(_MATRIX, _MATRIX).astype(np.float32))
    graphs = {
        "3x3 convolution": (
            _CONV_FLOPS,
            image,
            operations.convolution(
                image, operations.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1]
            ),
        ),
        "matrix product": (
            _MATRIX_FLOPS,
            matrix,
            operations.matmul(matrix, factor, False, False),
        ),
    }
    for precision, kind in _OPENVINO_TYPES.items():
        if precision.upper() not in native:
            continue
        config = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        for name, (flops, source, result) in graphs.items():
            model = openvino.Model([result], [source])
            request = core.compile_model(model, "CPU", config).create_infer_request()
            yield Trial(precision, f"OpenVINO, {precision} {name}", flops, request.infer)


def _best_s(run: Callable[[], object], seconds: float) -> float:
    """The fastest of the runs that fit into `seconds`: what the machine can do undisturbed."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    """Print the ceilings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for each trial")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    run_explained(lambda: _print(arguments))


def _print(arguments: argparse.Namespace) -> None:
    try:
        found = measure_ceilings(arguments.threads, arguments.seconds)
    except (RuntimeError, ImportError) as error:  # a broken install of a library
        raise RuntimeFailure(f"the ceiling could not be measured: {first_line(error)}") from error
    if arguments.json:
        print(json.dumps({name: dataclasses.asdict(value) for name, value in found.items()}))
        return
    for name, value in found.items():
        print(f"{name}: {value.tflops:.3f} TFLOP/s ({value.measured_by})")


if __name__ == "__main__":
    main()
