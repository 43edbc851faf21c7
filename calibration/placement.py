"""Which layers are worth int8: rules first, then measured loss against operations gained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tiue_export.proof.quantization import BY_BLOCK, Point

from .onnx_layers import Layer

# Modules that NVIDIA's and Intel's recipes keep in float too: they do little work, and what they
# lose goes through everything that follows (research in docs/int8.md).
RULES = (
    (r"(^|\.)time_emb", "rule: the timestep's own layers do no work to speak of"),
    (
        r"(^|\.)(conv_in|post_quant_conv)$",
        "rule: the first convolution sees the latents themselves",
    ),
    (r"(^|\.)conv_out$", "rule: the last convolution makes the result itself"),
    (r"(^|\.)conv_shortcut$", "rule: a shortcut hands its error on undamped"),
)
_BLOCK = re.compile(r"^(.*?\.(?:resnets|attentions|upsamplers|downsamplers|text)\.[^.]+)")


@dataclass(frozen=True)
class Unit:
    """Layers that are quantized together; `psnr_db` of the latents when only they are."""

    layers: tuple[Layer, ...]
    psnr_db: float
    name: str = ""

    @property
    def flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @property
    def noise(self) -> float:
        """Mean squared error of the latents over the square of their peak."""
        return noise_of(self.psnr_db)


def noise_of(psnr_db: float) -> float:
    """PSNR in dB -> mean squared error relative to the peak's square."""
    return float(10 ** (-psnr_db / 10))


def excluded_by_rule(layer: Layer) -> str | None:
    """Why a layer stays in float whatever it measures; None for the others."""
    return next((why for pattern, why in RULES if re.search(pattern, layer.module)), None)


def units_of(layers: Iterable[Layer], sensitivity: str) -> dict[tuple[str, str], list[Layer]]:
    """(graph, name) -> one layer, or those of a block: a resnet, an attention, the shared text."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        found = _BLOCK.match(layer.module) if sensitivity == BY_BLOCK else None
        groups.setdefault((layer.graph, found[1] if found else layer.name), []).append(layer)
    return groups


@dataclass
class Selection:
    """The largest set found that meets the target: the first `count` of `order`."""

    order: list[Unit]
    count: int
    points: list[Point] = field(default_factory=list)

    @property
    def chosen(self) -> set[tuple[str, str]]:
        """(graph, name) of each layer in int8."""
        return {layer.key for unit in self.order[: self.count] for layer in unit.layers}

    @property
    def psnr_db(self) -> float | None:
        """As measured for the chosen set; None for the empty one."""
        return next((p.psnr_db for p in self.points if p.units == self.count), None)


def select(
    units: Sequence[Unit],
    target_psnr_db: float,
    total_flops: int,
    measure: Callable[[Sequence[Unit]], float],
    curve_sets: int = 0,
) -> Selection:
    """Take units in order of noise per operation, as many as the measured PSNR allows.

    Errors of different layers are about independent, so their noises add up: that says where to
    look first. `measure` tells the truth of a set; the border is found by bisection, as each unit
    more can only make it worse, up to chance. Then `curve_sets` further sets are measured, at even
    shares of the operations: they tell what another target would buy, and choose nothing.
    """
    order = sorted(units, key=lambda unit: unit.noise / max(unit.flops, 1))
    result = Selection(order, 0)

    def good(count: int) -> bool:
        value = measure(order[:count])
        share = sum(unit.flops for unit in order[:count]) / max(total_flops, 1)
        result.points.append(Point(count, share, value))
        return value >= target_psnr_db

    if order and good(len(order)):
        result.count = len(order)
    else:
        result.count = _border(len(order), _predicted(order, target_psnr_db), good)
    measured = {point.units for point in result.points}
    for count in _even_shares(order, curve_sets):
        if count not in measured:
            good(count)
    return result


def _border(count: int, guess: int, good: Callable[[int], bool]) -> int:
    """The largest number below `count` that is good, by bisection; `guess` is tried first."""
    low, high = 0, count
    while high - low > 1:
        middle = guess if low < guess < high else (low + high) // 2
        guess = -1
        if good(middle):
            low = middle
        else:
            high = middle
    return low


def _even_shares(order: Sequence[Unit], sets: int) -> list[int]:
    """Numbers of first units that hold 1, 2, ... of `sets` + 1 equal parts of all operations."""
    total, reached = sum(unit.flops for unit in order), 0
    counts: list[int] = []
    for count, unit in enumerate(order, start=1):
        reached += unit.flops
        while len(counts) < sets and reached * (sets + 1) >= total * (len(counts) + 1):
            counts.append(count)
    return sorted({count for count in counts if count < len(order)})


def _predicted(order: Sequence[Unit], target_psnr_db: float) -> int:
    budget, total = noise_of(target_psnr_db), 0.0
    for count, unit in enumerate(order):
        total += unit.noise
        if total > budget:
            return count
    return len(order) - 1
