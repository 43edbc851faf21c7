"""How many bits each weight needs: a recipe found by measuring what each one's rounding costs.

For every weight the student is run once with that weight alone in 4 bits, and the error of the
latents measured. Errors of small perturbations are proportional to the perturbation, and those of
different weights add up in power, so one run per weight predicts every choice of bits; the choice
is then measured as a whole, and corrected. Runs are at a small picture size: what matters is the
order of the weights, and it hardly depends on it.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tiue_export.bundle.manifest import Manifest
from tiue_export.errors import BundleError, UsageError
from tiue_export.export.coreml.compress import LEAST_WEIGHTS, palette
from tiue_export.export.coreml.job import load_pool
from tiue_export.export.coreml.layout import with_layout
from tiue_export.export.coreml.profiles import CoremlPlan
from tiue_export.export.own_student import Size, fp32_options
from tiue_export.graphs.build import Graph, build_graphs
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, UNET_GRAPHS, Array
from tiue_export.student.model import Student
from tiue_export.system.json_file import read_json

FORMAT = 1
BITS = (4, 6, 8, 16)
_PROBE = BITS[0]
_ROUNDS = 6
# coremltools names a half-precision weight after torch.export's placeholder of the parameter.
_PREFIX, _SUFFIX = "p_", "_to_fp16"


@dataclass(frozen=True)
class MixedRecipe:
    """Bits of each weight by graph and by the weight's name in the package; 16 leaves it alone.

    `measured_db` is the latents' PSNR with all of them, in float32 arithmetic; `sensitivity_db`
    what each weight alone in 4 bits costs.
    """

    bits: Mapping[str, Mapping[str, int]]
    measured_db: float | None = None
    size_bytes: int = 0
    sensitivity_db: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON, for `--bits`."""
        data = {
            "format": FORMAT,
            "measured_db": self.measured_db,
            "size_bytes": self.size_bytes,
            "bits": {graph: dict(bits) for graph, bits in self.bits.items()},
            "sensitivity_db": {graph: dict(db) for graph, db in self.sensitivity_db.items()},
        }
        path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")


def read_recipe(path: Path) -> Mapping[str, Mapping[str, int]]:
    """The bits of a recipe file. Raises `UsageError` naming what is wrong with it."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--bits {path} cannot be read: {error}") from error
    bits = data.get("bits") if isinstance(data, dict) else None
    if not isinstance(bits, dict) or data.get("format") != FORMAT:
        raise UsageError(
            f"--bits {path} is no recipe of format {FORMAT}",
            f"An export with --target-psnr or --target-mb writes one, as coreml/{path.name}.",
        )
    for graph, weights in bits.items():
        if not isinstance(weights, dict):
            raise UsageError(f"--bits {path}: {graph} is no object of weights and their bits")
        wrong = {name: n for name, n in weights.items() if n not in BITS}
        if graph not in UNET_GRAPHS or wrong:
            raise UsageError(
                f"--bits {path}: {graph} {wrong or ''} is not of {UNET_GRAPHS} with bits {BITS}"
            )
    return bits


@dataclass(frozen=True)
class RecipeSearch:
    """What a recipe is searched for: a PSNR of the latents, or MB of both UNet graphs' weights."""

    student: Student
    manifest: Manifest
    plan: CoremlPlan
    size: Size
    work: Path
    target_psnr_db: float | None
    target_mb: float | None


@dataclass(frozen=True)
class _Weight:
    """One weight in the running. `noise[bits]` is its mean squared error, `gain` the latents'
    mean squared error for each unit of it."""

    graph: str
    name: str
    parameter: nn.Parameter
    noise: Mapping[int, float]
    gain: float

    @property
    def count(self) -> int:
        return int(self.parameter.numel())

    def cost(self, bits: int) -> float:
        """The latents' expected squared error."""
        return self.gain * self.noise[bits]

    def size_bytes(self, bits: int) -> int:
        return self.count * bits // 8


def find_recipe(
    job: RecipeSearch, say: Callable[[float, str], None] = lambda fraction, detail: None
) -> MixedRecipe:
    """Measure every weight, choose bits for the target, and check the choice as a whole."""
    with torch.no_grad():
        probe = _Probe(job, _small(job))
        weights = _measured(probe, say)
        whole = _Probe(job, job.size)
        parameters = {(w.graph, w.name): w.parameter for w in whole.named()}
        bits, measured = _chosen(job, whole, weights, parameters, say)
    by_graph: dict[str, dict[str, int]] = {graph: {} for graph in UNET_GRAPHS}
    sensitivity: dict[str, dict[str, float]] = {graph: {} for graph in UNET_GRAPHS}
    for weight in weights:
        by_graph[weight.graph][weight.name] = bits[weight.graph, weight.name]
        sensitivity[weight.graph][weight.name] = round(probe.db(weight.cost(_PROBE)), 2)
    size_bytes = sum(w.size_bytes(bits[w.graph, w.name]) for w in weights)
    return MixedRecipe(by_graph, round(measured, 2), size_bytes, sensitivity)


def _small(job: RecipeSearch) -> Size:
    """The least size that the UNet halves evenly, doubled: enough for attention to matter."""
    least = 16 * job.manifest.vae_scale
    return min(job.size[0], least), min(job.size[1], least)


class _Probe:
    """The student's two UNet graphs at one size, in the layout that is exported."""

    def __init__(self, job: RecipeSearch, size: Size) -> None:
        options, plan = fp32_options(job.manifest, size), job.plan
        self.graphs: dict[str, Graph] = {
            graph.spec.name: graph for graph in build_graphs(job.student, options, only=UNET_GRAPHS)
        }
        self.modules = {
            name: with_layout(graph, plan.attention, plan.linear, plan.decoder_batch)
            for name, graph in self.graphs.items()
        }
        own = load_pool(job.work, "student", job.size)
        self.pool = {key: torch.from_numpy(own[key]) for key in ("encoder_hidden_states", "sample")}
        shape = tuple(int(side) for side in self.graphs[UNET_ENCODER].spec.inputs[0].shape)
        if shape != tuple(self.pool["sample"].shape):
            self.pool["sample"] = torch.from_numpy(noise_from_seed(0, shape))
        self.features = self._encode()
        self.reference: Array = self._decode(self.features).numpy()

    def named(self) -> Iterator[_Weight]:
        """Weights worth a palette, under their names in the package."""
        for graph, module in self.modules.items():
            for path, parameter in module.named_parameters():
                if parameter.ndim >= 2 and parameter.numel() >= LEAST_WEIGHTS:
                    name = f"{_PREFIX}{path.replace('.', '_')}{_SUFFIX}"
                    yield _Weight(graph, name, parameter, {}, 0.0)

    def latents(self, changed: str = UNET_ENCODER) -> Array:
        """The latents now; the encoder is run only if a weight of its own was changed."""
        features = self._encode() if changed == UNET_ENCODER else self.features
        return self._decode(features).numpy()

    def db(self, squared_error: float) -> float:
        """A mean squared error of the latents as PSNR."""
        peak = float(np.abs(self.reference).max())
        return 20 * math.log10(peak / math.sqrt(max(squared_error, 1e-30)))

    def _encode(self) -> dict[str, Tensor]:
        return self._run(UNET_ENCODER, self.pool)

    def _decode(self, features: Mapping[str, Tensor]) -> Tensor:
        return self._run(UNET_DECODER, {**self.pool, **features})["latents"]

    def _run(self, graph: str, pool: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec = self.graphs[graph].spec
        outputs = self.modules[graph](*(pool[tensor.name] for tensor in spec.inputs))
        return dict(zip((tensor.name for tensor in spec.outputs), outputs, strict=True))


def _measured(probe: _Probe, say: Callable[[float, str], None]) -> list[_Weight]:
    """Every weight with its rounding errors and what they do to the latents."""
    named = list(probe.named())
    measured = []
    for index, weight in enumerate(named):
        say(0.8 * index / len(named), f"weight {index + 1} of {len(named)}")
        original = weight.parameter.detach().numpy()
        noise = {16: 0.0}
        probed: Array = original
        for bits in BITS[:-1]:
            rounded = rounded_to(original, bits)
            noise[bits] = float(np.mean(np.square(rounded - original, dtype=np.float64)))
            probed = rounded if bits == _PROBE else probed
        with _swapped({id(weight.parameter): (weight.parameter, probed)}):
            error = probe.latents(weight.graph) - probe.reference
        squared = float(np.mean(np.square(error, dtype=np.float64)))
        gain = squared / noise[_PROBE] if noise[_PROBE] else 0.0
        measured.append(_Weight(weight.graph, weight.name, weight.parameter, noise, gain))
    return measured


def rounded_to(weight: Array, bits: int) -> Array:
    """A float32 weight as a palette of 2**bits half-precision values gives it back."""
    colours, places = palette(weight.astype(np.float16), bits)
    rounded: Array = colours[places].reshape(weight.shape).astype(np.float32)
    return rounded


@contextmanager
def _swapped(values: Mapping[int, tuple[nn.Parameter, Array]]) -> Iterator[None]:
    """Other values in some parameters, for a while."""
    kept = [(parameter, parameter.data) for parameter, _ in values.values()]
    try:
        for parameter, value in values.values():
            parameter.data = torch.from_numpy(np.ascontiguousarray(value))
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _chosen(
    job: RecipeSearch,
    whole: _Probe,
    weights: list[_Weight],
    parameters: Mapping[tuple[str, str], nn.Parameter],
    say: Callable[[float, str], None],
) -> tuple[dict[tuple[str, str], int], float]:
    """Bits for the target, and the PSNR measured with all of them at the export's own size."""
    aim = job.target_psnr_db
    for turn in range(_ROUNDS):
        say(0.8 + 0.2 * turn / _ROUNDS, "measure the whole recipe")
        budget = None if job.target_mb is None else job.target_mb * 1e6
        goal = None if aim is None else _squared(whole, aim)
        bits = choose_bits(weights, goal, budget)
        values = {}
        for (graph, name), number in bits.items():
            if number < BITS[-1]:
                parameter = parameters[graph, name]
                values[id(parameter)] = parameter, rounded_to(parameter.detach().numpy(), number)
        with _swapped(values):
            measured = psnr_db(whole.reference, whole.latents())
        if aim is None or job.target_psnr_db is None or measured >= job.target_psnr_db:
            return bits, measured
        if all(number == BITS[-1] for number in bits.values()):
            break
        aim += job.target_psnr_db - measured + 0.5
    raise UsageError(
        f"no recipe reaches {job.target_psnr_db:.0f} dB; the best found reaches {measured:.1f} dB",
        "Lower --target-psnr, or use --compress none.",
    )


def _squared(probe: _Probe, db: float) -> float:
    peak = float(np.abs(probe.reference).max())
    return float((peak / 10 ** (db / 20)) ** 2)


def choose_bits(
    weights: list[_Weight], goal: float | None, budget_bytes: float | None
) -> dict[tuple[str, str], int]:
    """Start every weight at the fewest bits; give more where a byte buys most, until it is enough.

    `goal` is the largest mean squared error of the latents, `budget_bytes` the largest size of all
    weights. Raises `BundleError` when even the fewest bits are too many.
    """
    chosen = {(w.graph, w.name): BITS[0] for w in weights}
    error = sum(w.cost(BITS[0]) for w in weights)
    size = float(sum(w.size_bytes(BITS[0]) for w in weights))
    if budget_bytes is not None and size > budget_bytes:
        raise BundleError(
            f"the UNet's weights take {size / 1e6:.1f} MB in {BITS[0]} bits; --target-mb is "
            f"{budget_bytes / 1e6:.1f}",
            "Raise --target-mb.",
        )
    queue = [entry for i, w in enumerate(weights) if (entry := _step(w, i, BITS[0]))]
    heapq.heapify(queue)
    while queue and (goal is None or error > goal):
        _, index, bits = heapq.heappop(queue)
        weight = weights[index]
        now = chosen[weight.graph, weight.name]
        more = weight.size_bytes(bits) - weight.size_bytes(now)
        if budget_bytes is not None and size + more > budget_bytes:
            continue
        chosen[weight.graph, weight.name] = bits
        error += weight.cost(bits) - weight.cost(now)
        size += more
        if entry := _step(weight, index, bits):
            heapq.heappush(queue, entry)
    return chosen


def _step(weight: _Weight, index: int, bits: int) -> tuple[float, int, int] | None:
    """The next step up from `bits`: minus what it gains per byte, the weight, the bits."""
    higher = [number for number in BITS if number > bits]
    if not higher:
        return None
    gained = weight.cost(bits) - weight.cost(higher[0])
    paid = weight.size_bytes(higher[0]) - weight.size_bytes(bits)
    return -gained / paid, index, higher[0]
