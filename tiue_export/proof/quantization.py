"""Making a bundle int8: what may be asked, and what is answered, the verdict above all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiue_export.bundle.read import Bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.quantization_plan import W8A8, WEIGHTS, QuantizationPlan
from tiue_export.specs import TEXT_ENCODER, UNET_GRAPHS, VAE_DECODER

KINDS = (W8A8, "hybrid", WEIGHTS)
RANGE_METHODS = ("min-max", "percentile", "entropy")
BY_LAYER, BY_BLOCK, BY_RULE = "layer", "block", "none"
SENSITIVITIES = (BY_LAYER, BY_BLOCK, BY_RULE)
ONNX, OPENVINO = "onnx", "openvino"
BACKENDS = (ONNX, OPENVINO)
FASTER, SMALLER = "faster", "smaller"
UNET, VAE, TEXT = "unet", "vae", "text"
# What can be quantized, part by part; of the text encoder only the weights are.
PARTS: Mapping[str, tuple[str, ...]] = {
    UNET: UNET_GRAPHS,
    VAE: (VAE_DECODER,),
    TEXT: (TEXT_ENCODER,),
}
# What the new bundle is called beside the float ones that it is held against.
CONTENDER = "quantized"
# How the graphs were loaded while they were timed.
TOGETHER = "loaded together, in turn"
ALONE = "each loaded for its turn alone"


@dataclass(frozen=True)
class RangeMethod:
    """How a threshold is chosen; `percentile` in percent, for that method."""

    name: str = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in RANGE_METHODS:
            raise unknown_name("range method", self.name, RANGE_METHODS)
        if not 50 <= self.percentile <= 100:
            raise UsageError(f"--percentile is {self.percentile:g}; expected 50 to 100")

    def __str__(self) -> str:
        return f"percentile {self.percentile:g}" if self.name == "percentile" else self.name


@dataclass(frozen=True)
class AnalysisOptions:
    """How a plan is made.

    `kind` w8a8; hybrid: convolutions w8a8, linear layers int8 weights; int8-weights: no range is
    needed. `smoothing_alpha` None folds nothing. `held_out` drawings judge sets of layers, `probed`
    of them single layers. `curve_sets` further sets are measured for the curve of quality against
    operations in int8.
    """

    kind: str = W8A8
    ranges: RangeMethod = field(default_factory=RangeMethod)
    smoothing_alpha: float | None = 0.5
    sensitivity: str = "layer"
    target_psnr_db: float = 35.0
    held_out: int = 4
    probed: int = 2
    threads: int | None = None
    curve_sets: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind", self.kind, KINDS)
        if self.sensitivity not in SENSITIVITIES:
            raise unknown_name("sensitivity", self.sensitivity, SENSITIVITIES)
        if self.smoothing_alpha is not None and not 0 < self.smoothing_alpha < 1:
            raise UsageError(
                f"--smooth is {self.smoothing_alpha:g}; expected a number between 0 and 1",
                "0.5 shares the difficulty evenly between input and weights; --no-smooth leaves it "
                "out.",
            )
        if not 1 <= self.probed <= self.held_out:
            raise UsageError(f"{self.probed} probed drawings; expected 1 to {self.held_out}")


@dataclass(frozen=True)
class VerdictOptions:
    """Where to judge, and what it takes to pass.

    `must_be` faster or smaller; None: for a device that this machine is not, where speed is only
    reported. `gate_psnr_db` None takes the gate of what the graphs became.
    """

    runtime: str = "ort"
    precision: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    low_memory: bool = False
    rounds: int = 5
    must_be: str | None = FASTER
    gate_psnr_db: float | None = None


@dataclass(frozen=True)
class QuantizeOptions:
    """What to make and what it must reach.

    `parts` are keys of `PARTS`; a `plan`, a file in place of an analysis, names its layers itself.
    `kind` is one of the analysis' kinds, or 4-bit with the openvino backend. `any_speed` leaves
    speed and size unjudged.
    """

    kind: str = W8A8
    backend: str = ONNX
    parts: tuple[str, ...] = (UNET,)
    analysis: AnalysisOptions = field(default_factory=AnalysisOptions)
    judged: VerdictOptions = field(default_factory=VerdictOptions)
    plan: Path | None = None
    scales: str = "auto"
    any_speed: bool = False
    allow_loss: bool = False
    allow_slower: bool = False


@dataclass(frozen=True)
class Point:
    """One set of quantized layers: its part of all operations and what the latents measured."""

    units: int
    int8_share: float
    psnr_db: float


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan, and the sets of layers that were measured on the way to it."""

    plan: QuantizationPlan
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Loss:
    """What became of an output, and the gate that it has to pass."""

    psnr_db: float
    max_abs_error: float
    gate_psnr_db: float

    @property
    def passed(self) -> bool:
        return self.psnr_db >= self.gate_psnr_db


@dataclass(frozen=True)
class Verdict:
    """What was measured. `latency_ms`: contender -> graph -> median of all its runs in one drawing;
    `unet` is the sum of its graphs, `all` of all that are quantized.

    `pictures` are a quantized VAE decoder's of the float graphs' latents, None where it stays as it
    is. `speed_ratio` is the fastest float contender's time over the quantized one's: above 1 is a
    gain. `loading` says how the graphs were held: `TOGETHER` or `ALONE`; loading itself is never
    timed. Sizes are of those graphs' files in the form that ran, under "float" and `CONTENDER`.
    """

    runtime: str
    inputs: str
    latents_psnr_db: float
    max_abs_error: float
    gate_psnr_db: float
    loading: str
    latency_ms: Mapping[str, Mapping[str, float]]
    speed_ratio: float
    size_bytes: Mapping[str, int]
    int8_share: float
    must_be: str | None
    blame: tuple[str, ...]
    pictures: Loss | None = None

    @property
    def accurate(self) -> bool:
        latents = self.latents_psnr_db >= self.gate_psnr_db
        return latents and (self.pictures is None or self.pictures.passed)

    @property
    def worth_it(self) -> bool:
        """Whether it is faster or smaller, as asked."""
        if self.must_be == FASTER:
            return self.speed_ratio > 1
        if self.must_be == SMALLER:
            return self.size_bytes[CONTENDER] < self.size_bytes["float"]
        return True

    def to_data(self) -> dict[str, Any]:
        """For JSON."""
        words = {"accurate": self.accurate, "worth_it": self.worth_it}
        return {**dataclasses.asdict(self), **words}


@dataclass(frozen=True)
class Quantized:
    """The new bundle, what it was judged by, and the sets that were tried on the way."""

    bundle: Bundle
    plan: QuantizationPlan
    verdict: Verdict
    curve: tuple[Point, ...]
