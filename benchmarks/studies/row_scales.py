"""Does a scale per timestep pay? One int8 scale for all decoder rows against one for each row.

    python -m tiue_export.benchmarks.studies.row_scales BUNDLE --calibration DATA

The decoder sees K timesteps at once: row k*B + b of every tensor belongs to timestep k. One scale
has to cover them all. Dividing each row by a constant of its own before a layer and multiplying by
it after is exact, as convolutions and linear layers are linear; so a scale per row can be had for
two cheap operations a layer. Measured is what it would bring: the loss of each layer alone, and of
all layers together, with one scale and with row scales.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.folder import open_bundle
from tiue_export.specs import UNET_DECODER, Array

from ..explained import run_explained

_CALIBRATION = "tiue_export.calibration"
_LEVELS = 127


@dataclass(frozen=True)
class LayerRows:
    """One decoder layer: `spread` is the largest row range over the smallest; PSNR in dB."""

    name: str
    spread: float
    one_scale_db: float
    row_scales_db: float

    @property
    def gain_db(self) -> float:
        return self.row_scales_db - self.one_scale_db


@dataclass(frozen=True)
class RowScales:
    """The experiment's outcome; `all_*` are of all layers together."""

    layers: tuple[LayerRows, ...]
    all_one_scale_db: float
    all_row_scales_db: float

    @property
    def gain_db(self) -> float:
        return self.all_row_scales_db - self.all_one_scale_db


def measure(bundle_path: Path, calibration: Path, held_out: int = 4, every: int = 1) -> RowScales:
    """Run the experiment; `every` n-th layer is also measured alone (0: none)."""
    module = _modules()
    bundle = open_bundle(bundle_path)
    data = module["dataset"].open_calibration(calibration, bundle)
    ranges = module["histogram"].RangeMethod("min-max")
    options = module["analysis"].AnalysisOptions(
        ranges=ranges, smoothing_alpha=None, held_out=held_out, probed=min(2, held_out)
    )
    analyser = module["analysis"].Analyser(bundle, data, options)
    observed = analyser.observed(UNET_DECODER)
    layers = [
        layer
        for layer in analyser.layers[UNET_DECODER]
        if module["placement"].excluded_by_rule(layer) is None
        and len(observed[layer.activation].rows) > data.index.batch
    ]
    _, numbers = module["capture"].choose_runs(data, held_out)
    probe = module["probe"].Probe(bundle, data, numbers)
    path = bundle.graph_path(UNET_DECODER)

    def loss(chosen: Sequence[Any], rows: bool) -> float:
        changes = [
            _change(module, layer, observed[layer.activation].rows, rows) for layer in chosen
        ]
        model = module["simulate"].simulated_model(path, changes)
        return float(probe.of_model(UNET_DECODER, model))

    alone = [
        LayerRows(
            layer.name,
            _spread(observed[layer.activation].rows),
            loss([layer], False),
            loss([layer], True),
        )
        for layer in layers[:: every or len(layers) + 1][: None if every else 0]
    ]
    return RowScales(tuple(alone), loss(layers, False), loss(layers, True))


def _change(module: dict[str, Any], layer: Any, rows: Array, per_row: bool) -> Any:
    largest = float(rows.max())
    if not per_row:
        return module["simulate"].Simulated(layer, largest / _LEVELS)
    factors = np.maximum(rows, largest * 1e-6) / largest
    return module["simulate"].Simulated(layer, largest / _LEVELS, rows=factors)


def _spread(rows: Array) -> float:
    least = float(rows.min())
    return float(rows.max()) / least if least > 0 else math.inf


def _modules() -> dict[str, Any]:
    # Calibration is another spoke, so it is reached by name.
    names = ("analysis", "capture", "dataset", "histogram", "placement", "probe", "simulate")
    return {name: importlib.import_module(f"{_CALIBRATION}.{name}") for name in names}


def main() -> None:
    """Print the outcome of one bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of `calibrate`")
    parser.add_argument("--held-out", type=int, default=4, help="runs to judge by")
    parser.add_argument(
        "--every", type=int, default=1, help="measure each n-th layer alone; 0: none"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    run_explained(lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> None:
    result = measure(arguments.bundle, arguments.calibration, arguments.held_out, arguments.every)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")
    print("| decoder layer | row ranges, most / least | one scale dB | row scales dB | gain dB |")
    print("|---|---:|---:|---:|---:|")
    for layer in sorted(result.layers, key=lambda found: -found.gain_db)[:15]:
        cells = (layer.spread, layer.one_scale_db, layer.row_scales_db, layer.gain_db)
        print(f"| {layer.name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    print(
        f"all layers together: one scale {result.all_one_scale_db:.2f} dB, row scales "
        f"{result.all_row_scales_db:.2f} dB, gain {result.gain_db:+.2f} dB"
    )


if __name__ == "__main__":
    main()
