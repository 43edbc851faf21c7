"""Captured data -> a quantization plan: ranges, folds, sensitivity, and the set that is chosen.

What was measured is kept in the calibration folder (analysis/), so that a run that is stopped, or
one with another target, goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export._version import __version__
from tiue_export.bundle.read import Bundle
from tiue_export.graphs.flops import count_flops
from tiue_export.proof.calibration import CalibrationData, graphs_sha256
from tiue_export.proof.quantization import BY_RULE, UNET, AnalysisOptions
from tiue_export.proof.quantization_plan import (
    FLOAT,
    PLAN_VERSION,
    W8A8,
    WEIGHTS,
    FoldPlan,
    LayerPlan,
    QuantizationPlan,
    student_identity,
)
from tiue_export.specs import Array
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.json_file import parse_json
from tiue_export.system.owned_path import temporary_folder
from tiue_export.system.progress import Observer

from .capture import choose_drawings
from .observe import Observed, observe, watched
from .onnx_layers import CONV, Fold, Layer, Weights, find_folds, find_layers
from .parts import Judge, Part
from .placement import (
    Selection,
    Unit,
    excluded_by_rule,
    select,
    units_of,
)
from .qdq_onnx import LEVELS, matched_folds, write_qdq
from .simulate import Simulated, simulated_model

# Beyond 2**8 a factor could push a half graph's norm or weight out of its range.
_LARGEST_EXPONENT = 8


@dataclass(frozen=True)
class Analysis:
    """A plan with what led to it."""

    plan: QuantizationPlan
    selection: Selection | None


class Analyser:
    """One part of a bundle, one set of captured data, one set of options."""

    def __init__(
        self,
        bundle: Bundle,
        data: CalibrationData,
        options: AnalysisOptions,
        observer: Observer | None = None,
        part: str = UNET,
    ) -> None:
        self.bundle, self.data, self.options = bundle, data, options
        self._observer = observer or Observer()
        self.part = Part(part, bundle, data, options.threads)
        self.graphs = self.part.graphs
        self._ranged, self._judged = choose_drawings(data, options.held_out)
        # Every pass runs both graphs once; the decoder on so many rows, or fewer.
        steps = max(one.rows for one in bundle.manifest.plan.passes)
        batch = bundle.manifest.batch or 1
        self.layers: dict[str, list[Layer]] = {}
        self.folds: dict[str, list[Fold]] = {}
        for graph in self.graphs:
            self.layers[graph] = find_layers(bundle.graph_path(graph), graph, batch, steps)
            self.folds[graph] = find_folds(bundle.graph_path(graph), self.layers[graph])
        self.total_flops = sum(
            count_flops(bundle.graph_path(graph), batch, steps).total for graph in self.graphs
        )
        self._factors: dict[str, dict[str, Array]] = {graph: {} for graph in self.graphs}
        self.scales: dict[tuple[str, str], float] = {}

    def run(self) -> Analysis:
        """Make the plan; see the module's docstring."""
        if self.options.kind == WEIGHTS:
            return Analysis(self._plan({}, {}), None)
        self.part.prepare([*self._ranged, *self._judged], self._observer)
        self._find_ranges()
        if self.options.sensitivity == BY_RULE:
            return Analysis(self._plan({}, {}), None)
        candidates = [layer for layer in self._all() if self._may_be_int8(layer)]
        units = self._probe(units_of(candidates, self.options.sensitivity))
        measured = {layer.key: unit for unit in units for layer in unit.layers}
        selection = self._select(units)
        whys = self._whys(candidates, selection)
        return Analysis(self._plan(whys, measured), selection)

    def observed(
        self, graph: str, divide: Mapping[str, Array] | None = None
    ) -> dict[str, Observed]:
        """What passes through the inputs of a graph's layers, over the runs for ranges."""
        path, tensors = self.bundle.graph_path(graph), watched(self.layers[graph], divide)
        runs = self.part.run_count(graph, self._ranged)

        def on_run(done: int) -> None:
            self._observer.on_progress(done / runs, f"ranges of {graph}, run {done}/{runs}")

        feeds = self.part.runs(graph, self._ranged)
        return observe(path, tensors, feeds, self.options.threads, on_run)

    def _all(self) -> Iterator[Layer]:
        for graph in self.graphs:
            yield from self.layers[graph]

    def _may_be_int8(self, layer: Layer) -> bool:
        allowed = layer.op == CONV or self.options.kind != "hybrid"
        return allowed and excluded_by_rule(layer) is None

    def _find_ranges(self) -> None:
        for graph in self.graphs:
            self._observer.on_start(f"ranges of {graph}")
            kept = self._kept("ranges", graph=graph)
            if kept.is_file():
                found = json.loads(kept.read_text("utf-8"))
            else:
                found = self._measure_ranges(graph)
                kept.parent.mkdir(exist_ok=True)
                write_atomically(kept, json.dumps(found).encode())
            self._factors[graph] = {
                name: np.ldexp(np.float32(1), np.array(exponents))
                for name, exponents in found["exponents"].items()
            }
            for layer in self.layers[graph]:
                self.scales[graph, layer.name] = found["thresholds"][layer.activation] / LEVELS

    def _measure_ranges(self, graph: str) -> dict[str, Any]:
        observed = self.observed(graph)
        exponents: dict[str, list[int]] = {}
        if self.options.smoothing_alpha is not None and self.options.kind == W8A8:
            exponents = self._exponents(graph, observed)
        if exponents:
            divide = {name: np.ldexp(1.0, np.array(e)) for name, e in exponents.items()}
            observed = self.observed(graph, divide)
        thresholds = {
            name: seen.histogram.threshold(self.options.ranges) for name, seen in observed.items()
        }
        return {"exponents": exponents, "thresholds": thresholds}

    def _exponents(self, graph: str, observed: Mapping[str, Observed]) -> dict[str, list[int]]:
        """SmoothQuant (Xiao et al. 2023, Eq. 4) in powers of two, about 2**0 in the middle."""
        import onnx

        path, alpha = self.bundle.graph_path(graph), self.options.smoothing_alpha or 0.0
        weights = Weights(onnx.load(str(path), load_external_data=False), path.parent)
        known = {layer.name: layer for layer in self.layers[graph]}
        found = {}
        for fold in self.folds[graph]:
            inputs = observed[fold.activation].channels.astype(np.float64)
            largest = np.max(
                [
                    np.abs(weights.read(known[name].weight)).max(axis=known[name].output_axis)
                    for name in fold.layers
                ],
                axis=0,
            ).astype(np.float64)
            alive = (inputs > 0) & (largest > 0)
            logs = np.zeros(len(inputs))
            logs[alive] = alpha * np.log2(inputs[alive]) - (1 - alpha) * np.log2(largest[alive])
            middle = np.median(logs[alive]) if alive.any() else 0.0
            steps = np.where(alive, np.rint(logs - middle), 0)
            bounded = np.clip(steps, -_LARGEST_EXPONENT, _LARGEST_EXPONENT).astype(int)
            if bounded.any():
                found[fold.activation] = bounded.tolist()
        return found

    def simulated(self, layer: Layer) -> Simulated:
        """A layer as this plan would quantize it."""
        factors = self._factors[layer.graph].get(layer.activation)
        return Simulated(layer, self.scales[layer.key], factors)

    def _probe(self, groups: Mapping[tuple[str, str], Sequence[Layer]]) -> list[Unit]:
        """Quantize one unit at a time; what is already measured is not measured again."""
        self._observer.on_start("sensitivity")
        journal = self._kept("sensitivity", level=self.options.sensitivity)
        known = _read_journal(journal)
        probe: Judge | None = None
        units = []
        for number, ((graph, name), group) in enumerate(groups.items()):
            key = f"{graph}/{name}"
            if key not in known:
                numbers = self._judged[: self.options.probed]
                probe = probe or self.part.judge(numbers)
                path = self.bundle.graph_path(graph)
                model = simulated_model(path, [self.simulated(layer) for layer in group])
                known[key] = probe.of_model(graph, model)
                _append(journal, key, known[key])
            units.append(Unit(tuple(group), known[key], name))
            detail = f"{name}: {known[key]:.1f} dB"
            self._observer.on_progress((number + 1) / len(groups), detail)
        return units

    def _select(self, units: Sequence[Unit]) -> Selection:
        self._observer.on_start("choose layers")
        probe = self.part.judge(self._judged)

        def measure(chosen: Sequence[Unit]) -> float:
            names = {layer.key for unit in chosen for layer in unit.layers}
            with self._written(names) as paths:
                value = probe.of_files(paths)
            self._observer.on_progress(0.5, f"{len(names)} layers in int8: {value:.1f} dB")
            self._observer.on_note(f"{len(names)} layers in int8: {value:.2f} dB")
            return value

        options = self.options
        return select(units, options.target_psnr_db, self.total_flops, measure, options.curve_sets)

    @contextmanager
    def _written(self, names: set[tuple[str, str]]) -> Iterator[dict[str, Path]]:
        """The real Q/DQ graphs of a set of layers, for as long as they are measured."""
        with temporary_folder(self.data.root) as folder:
            keys = [layer.key for layer in self._all()]
            plan = self._plan({key: (W8A8 if key in names else FLOAT, "") for key in keys}, {})
            paths = {}
            for graph in self.graphs:
                if plan.of(graph):
                    paths[graph] = write_qdq(
                        self.bundle.graph_path(graph),
                        folder / graph,
                        self.layers[graph],
                        plan.of(graph),
                        matched_folds(plan, graph, self.folds[graph]),
                    )
            yield paths

    def _whys(
        self, candidates: Sequence[Layer], selection: Selection
    ) -> dict[tuple[str, str], tuple[str, str]]:
        """(mode, why) of the layers that sensitivity decided."""
        chosen = selection.chosen
        rest = FLOAT if self.options.kind == W8A8 else WEIGHTS
        target = f"{self.options.target_psnr_db:g} dB"
        return {
            layer.key: (W8A8, f"chosen: the set meets {target}")
            if layer.key in chosen
            else (rest, f"left out: with it the set misses {target}")
            for layer in candidates
        }

    def _plan(
        self,
        whys: Mapping[tuple[str, str], tuple[str, str]],
        measured: Mapping[tuple[str, str], Unit],
    ) -> QuantizationPlan:
        layers, folds = [], self._fold_plans()
        for layer in self._all():
            mode, why = whys.get(layer.key) or self._by_rule(layer)
            scale, unit = self.scales.get(layer.key), measured.get(layer.key)
            layers.append(
                LayerPlan(
                    graph=layer.graph,
                    name=layer.name,
                    op=layer.op,
                    mode=mode,
                    why=why,
                    flops=layer.flops,
                    activation=layer.activation,
                    activation_scale=None if scale is None else float(scale),
                    psnr_db=None if unit is None else round(unit.psnr_db, 2),
                    unit="" if unit is None else unit.name,
                )
            )
        return QuantizationPlan(
            format_version=PLAN_VERSION,
            created_by=f"tiue-export {__version__}",
            student=student_identity(self.bundle.manifest),
            calibration=self.data.sha256,
            ranges="none" if self.options.kind == WEIGHTS else str(self.options.ranges),
            samples=len(self._ranged) * self.data.index.batch,
            target_psnr_db=self.options.target_psnr_db,
            total_flops=self.total_flops,
            layers=tuple(layers),
            folds=folds,
            smoothing_alpha=self.options.smoothing_alpha if folds else None,
        )

    def _by_rule(self, layer: Layer) -> tuple[str, str]:
        excluded = excluded_by_rule(layer)
        if self.options.kind == WEIGHTS:
            return (FLOAT, excluded) if excluded else (WEIGHTS, "kind: int8 weights")
        if excluded:
            return FLOAT, excluded
        if not self._may_be_int8(layer):
            return WEIGHTS, "kind: hybrid keeps the inputs of linear layers in float"
        return W8A8, "kind: every layer that no rule keeps out"

    def _fold_plans(self) -> tuple[FoldPlan, ...]:
        plans = []
        for graph in self.graphs:
            for fold in self.folds[graph]:
                factors = self._factors[graph].get(fold.activation)
                if factors is not None:
                    exponents = np.rint(np.log2(factors)).astype(int)
                    plans.append(FoldPlan(graph, fold.layers[0], " ".join(map(str, exponents))))
        return tuple(plans)

    def _kept(self, what: str, **more: str) -> Path:
        """Where a measurement is kept; its name says what decides it."""
        options = dataclasses.asdict(self.options)
        for undecided in ("target_psnr_db", "threads", "sensitivity", "curve_sets"):
            del options[undecided]
        if what == "ranges":
            del options["probed"]
        decides = {
            "data": self.data.sha256,
            "graphs": graphs_sha256(self.bundle),
            "version": PLAN_VERSION,
            **options,
            **self.part.identity,
            **more,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        suffix = "json" if what == "ranges" else "jsonl"
        return self.data.root / "analysis" / f"{what}-{digest[:16]}.{suffix}"


def _read_journal(path: Path) -> dict[str, float]:
    """What was measured before; a last line that a kill cut off is left out."""
    known: dict[str, float] = {}
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = parse_json(line)
                known[entry["unit"]] = float(entry["psnr_db"])
            except (ValueError, KeyError, TypeError):
                continue
    return known


def _append(path: Path, unit: str, psnr_db: float) -> None:
    """Add a line; one that a kill cut off is ended first, so that it takes no other with it."""
    path.parent.mkdir(exist_ok=True)
    line = json.dumps({"unit": unit, "psnr_db": psnr_db}) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode())
