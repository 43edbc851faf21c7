"""The quantization plan: what each layer becomes, with which scale, and why; as readable JSON.

A plan is made from measurements and may be edited by hand: set a layer's `mode` and give the file
to `quantize --plan`. It names layers as the graphs do, so it fits every bundle of the same student
that was exported with the same hoisting and upsampling, whatever its precision.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.bundle.manifest import Manifest, structured
from tiue_export.errors import BundleError, UsageError, unknown_name
from tiue_export.proof.gates import GATES_PSNR_DB, weakest
from tiue_export.specs import NEAREST
from tiue_export.system.json_file import read_json

PLAN_VERSION = 1
_LISTED = 5
PLAN_FILE = "quantization/plan.json"
VERDICT_FILE = "quantization/verdict.json"

W8A8, WEIGHTS, FLOAT = "w8a8", "int8-weights", "float"
MODES = (W8A8, WEIGHTS, FLOAT)
# What a graph may be beside its float precisions; each is a gate.
QUANTIZED = (W8A8, WEIGHTS, "4-bit")


@dataclass(frozen=True)
class LayerPlan:
    """One convolution or linear layer. `mode` is one of MODES, `why` says who decided.

    `activation_scale` s: x is about s * q with q in [-127, 127] (None without w8a8). `psnr_db` is
    that of the latents with `unit` alone in w8a8, which is this layer or the block it was measured
    with; None where it was not measured.
    """

    graph: str
    name: str
    op: str
    mode: str
    why: str
    flops: int
    activation: str
    activation_scale: float | None = None
    psnr_db: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class FoldPlan:
    """SmoothQuant at the input of `reader` and of all layers that share it: channel c is divided by
    2**exponents[c], the weights are multiplied by it. Powers of two, so that folding rounds
    nothing. `exponents` is text, one integer a channel.
    """

    graph: str
    reader: str
    exponents: str


@dataclass(frozen=True)
class QuantizationPlan:
    """All layers of some graphs of a bundle in running order; `total_flops` has attention too."""

    format_version: int
    created_by: str
    student: str
    calibration: str
    ranges: str
    samples: int
    target_psnr_db: float
    total_flops: int
    layers: tuple[LayerPlan, ...]
    folds: tuple[FoldPlan, ...] = ()
    smoothing_alpha: float | None = None

    def of(self, graph: str) -> dict[str, LayerPlan]:
        """The layers of one graph that become something else, by name."""
        chosen = (layer for layer in self.layers if layer.graph == graph)
        return {layer.name: layer for layer in chosen if layer.mode != FLOAT}

    def kind(self, graph: str) -> str | None:
        """The gate that a graph is judged by; None when nothing in it is quantized."""
        modes = {layer.mode for layer in self.of(graph).values()}
        return weakest(*modes) if modes else None

    @property
    def int8_share(self) -> float:
        """The part of all operations that is done in int8, from 0 to 1."""
        done = sum(layer.flops for layer in self.layers if layer.mode == W8A8)
        return done / self.total_flops if self.total_flops else 0.0

    def to_json(self) -> str:
        """One layer a line: made to be read and edited."""
        data = dataclasses.asdict(self)
        rows = {key: data.pop(key) for key in ("layers", "folds")}
        head = json.dumps(data, indent=1, allow_nan=False)[:-2]
        parts = [head]
        for key, values in rows.items():
            lines = ",\n  ".join(json.dumps(value, allow_nan=False) for value in values)
            parts.append(f' "{key}": [\n  {lines}\n ]' if values else f' "{key}": []')
        return ",\n".join(parts) + "\n}\n"


def joined(plans: Sequence[QuantizationPlan]) -> QuantizationPlan:
    """One plan of several parts of the same bundle, made with the same data."""
    ranged = [plan for plan in plans if plan.ranges != "none"]
    return dataclasses.replace(
        (ranged or plans)[0],
        total_flops=sum(plan.total_flops for plan in plans),
        layers=tuple(layer for plan in plans for layer in plan.layers),
        folds=tuple(fold for plan in plans for fold in plan.folds),
    )


def read_plan(path: Path) -> QuantizationPlan:
    """A plan from a file, checked field by field; raises `UsageError`."""
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as a plan: {error}", "Plans are written by `quantize`."
        ) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != PLAN_VERSION:
        raise UsageError(
            f"{path} is a plan of format version {version!r}; this program reads {PLAN_VERSION}",
            "Make it again with this version: leave out --plan.",
        )
    try:
        plan: QuantizationPlan = structured(QuantizationPlan, data, str(path))
    except BundleError as error:
        raise UsageError(error.message, "Undo the last edit, or make the plan again.") from error
    _check_layers(path, plan)
    return plan


def _check_layers(path: Path, plan: QuantizationPlan) -> None:
    for layer in plan.layers:
        if layer.mode not in MODES:
            raise unknown_name(f"mode of {layer.name} in {path}", layer.mode, MODES)
        scale = layer.activation_scale
        if layer.mode == W8A8 and (scale is None or not scale > 0):
            raise UsageError(
                f"{path}: {layer.name} is {W8A8} with the scale {scale}; expected a number above 0",
                f'Give it an activation_scale, or the mode "{WEIGHTS}" or "{FLOAT}".',
            )
    for fold in plan.folds:
        try:
            exponents_of(fold)
        except ValueError as error:
            raise UsageError(
                f"{path}: the exponents of {fold.reader} are not integers between -15 and 15"
            ) from error


def exponents_of(fold: FoldPlan) -> list[int]:
    """The exponents as numbers; raises `ValueError`."""
    numbers = [int(word) for word in fold.exponents.split()]
    if any(abs(number) > _LARGEST_EXPONENT for number in numbers):
        raise ValueError(fold.exponents)
    return numbers


# Half precision has five bits of exponent: larger factors could leave its range.
_LARGEST_EXPONENT = 15


def student_identity(manifest: Manifest) -> str:
    """SHA-256 of what decides the numbers in the UNet beside precision: weights, schedule,
    hoisting, upsampling and sizes. Captured data and plans fit every bundle that has the same.
    """
    plan = manifest.plan
    decides: dict[str, Any] = {
        "source": manifest.source.sha256,
        "parts": {k: v for k, v in manifest.source.part_sha256.items() if k != "vae"},
        # As bundles of format 1 spelled it: data captured for them goes on to fit.
        "schedule": {
            "steps": plan.steps,
            "timesteps": plan.timesteps,
            "prediction_type": plan.prediction_type,
            "noise_coefficient": plan.latents.noise,
            "output_coefficients": plan.latents.outputs,
            "timestep_spacing": plan.timestep_spacing,
            "merged_timesteps": plan.merged_timesteps,
        },
        "hoisted": manifest.hoisted,
        "latents": manifest.latent_shape[1:],
        "text": manifest.text_shape[1:],
    }
    if plan.fan_out:
        decides["fan_out"] = str(plan.fan_out)
    if manifest.upsampling != NEAREST:  # other layers, of the same names
        decides["upsampling"] = manifest.upsampling
    if plan.recipe:  # bundles of format 1 had no recipe
        decides["passes"] = [dataclasses.asdict(one) for one in plan.passes]
        decides["fresh_coefficients"] = plan.latents.fresh
        decides["embedded_guidance"] = plan.embedded_guidance
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def require_same_student(plan: QuantizationPlan, manifest: Manifest, what: str) -> None:
    """Refuse a plan made for other weights, another schedule, hoisting, upsampling or size."""
    if plan.student != student_identity(manifest):
        raise UsageError(
            f"the plan was made for another student, schedule, hoisting, upsampling or size than "
            f"{what}",
            "Make one for it: leave out --plan and give --calibration.",
        )


def largest_losses(plan: QuantizationPlan, graphs: Collection[str]) -> list[str]:
    """The quantized layers or blocks of graphs that cost most alone, worst first, as text."""
    losses = {
        f"{layer.graph}/{layer.unit or layer.name}": layer.psnr_db
        for layer in plan.layers
        if layer.graph in graphs and layer.psnr_db is not None and layer.mode == W8A8
    }
    worst = sorted(losses.items(), key=lambda entry: entry[1])[:_LISTED]
    return [f"{unit} ({psnr_db:.1f} dB alone)" for unit, psnr_db in worst]


def gate_of(kinds: Iterable[str]) -> float:
    """The PSNR in dB that latents must reach when graphs of these kinds are in the way."""
    return GATES_PSNR_DB[weakest(*kinds)]
