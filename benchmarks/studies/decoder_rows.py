"""What a group's size costs: time and memory against the rows of one decoder run.

    python -m tiue_export.benchmarks.studies.decoder_rows fd --runtime openvino --precision fp32 \\
        --rows 2,4,10,20,30 --json rows.json

One group of Faster Diffusion, the encoder once and `--steps` decoder steps with guidance, is run in
pieces of at most so many rows, which gives the same latents. All sizes run in one process, the
smallest first, as runtimes keep memory that they have taken; a peak is that of the runs alone,
loading left out (Linux; elsewhere that of the process).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.folder import Bundle, disk_errors, open_bundle
from tiue_export.bundle.manifest import Manifest
from tiue_export.drawing.pipeline import replanned
from tiue_export.errors import UsageError
from tiue_export.proof.parity import load_reference
from tiue_export.registry.runtimes import open_runtime
from tiue_export.sampling.plan_options import PlanChange
from tiue_export.sampling.sampler import sample_latents
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, Array, Feeds, Runtime, RuntimeOptions

from ..explained import run_explained
from ..figure import check_file
from ..latency.environment import describe_environment, forget_peak, process_memory_bytes

_STEPS = 15  # the last and largest group of the published 50 steps


@dataclass(frozen=True)
class RowsCost:
    """One size: `decoder_runs` pieces took `unet_decoder_s` in all; the peak is resident memory."""

    max_decoder_rows: int
    decoder_runs: int
    unet_encoder_s: float
    unet_decoder_s: float
    peak_memory_bytes: int


def decoder_rows_cost(
    bundle: Bundle, runtime: Runtime, rows: Sequence[int], steps: int = _STEPS
) -> list[RowsCost]:
    """The cost of a group of `steps` steps in pieces of each size, from the smallest on.

    Raises `UsageError` for a student's bundle, and for fewer rows than a step has.
    """
    warm_up = replanned(bundle, PlanChange(steps=1, key_steps=(0,))).manifest
    known = load_reference(bundle).arrays
    noise, text = known["noise"], known["encoder_hidden_states"]
    spent: dict[str, list[float]] = {}

    def run(graph: str, pool: Feeds) -> Mapping[str, Array]:
        spec = bundle.spec(graph)
        feeds = {t.name: pool[t.name].astype(t.dtype) for t in spec.inputs}
        start = time.perf_counter()
        outputs = runtime.run(graph, feeds)
        spent.setdefault(graph, []).append(time.perf_counter() - start)
        return outputs

    def draw(manifest: Manifest) -> Array:
        assert manifest.faster is not None
        return sample_latents(manifest.schedule, manifest.faster, run, noise, text)

    draw(warm_up)  # runtimes load on first use
    found = []
    for size in sorted(set(rows)):
        spent.clear()
        forget_peak()
        change = PlanChange(steps=steps, key_steps=(0,), max_decoder_rows=size)
        latents = draw(replanned(bundle, change).manifest)
        assert np.isfinite(latents).all()
        found.append(
            RowsCost(
                max_decoder_rows=size,
                decoder_runs=len(spent[UNET_DECODER]),
                unet_encoder_s=round(sum(spent[UNET_ENCODER]), 4),
                unet_decoder_s=round(sum(spent[UNET_DECODER]), 4),
                peak_memory_bytes=process_memory_bytes()[1],
            )
        )
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="made by --method faster")
    parser.add_argument("--rows", default="2,4,10,20,30", help="sizes, such as 2,10,30")
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"of the group; default {_STEPS}")
    parser.add_argument("--runtime", default="ort")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="record to write")
    arguments = parser.parse_args()
    run_explained(lambda: _run(arguments))


def _run(arguments: Any) -> None:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", arguments.rows):
        raise UsageError(f"--rows is {arguments.rows!r}; expected numbers, such as 2,10,30")
    check_file("--json", arguments.json)
    rows = [int(part) for part in arguments.rows.split(",")]
    environment = describe_environment()
    bundle = open_bundle(arguments.bundle)
    options = RuntimeOptions(device="cpu", threads=arguments.threads, precision=arguments.precision)
    runtime = open_runtime(arguments.runtime, bundle, options)
    try:
        found = decoder_rows_cost(bundle, runtime, rows, arguments.steps)
    finally:
        runtime.close()
    print(f"{'rows':>5}  {'runs':>5}  {'decoder s':>10}  {'peak GB':>8}")
    for cost in found:
        gigabytes = cost.peak_memory_bytes / 1e9
        print(
            f"{cost.max_decoder_rows:5}  {cost.decoder_runs:5}  {cost.unet_decoder_s:10.3f}  "
            f"{gigabytes:8.2f}"
        )
    if arguments.json is not None:
        record = {
            "environment": asdict(environment),
            "runtime": f"{arguments.runtime} {arguments.precision}",
            "steps": arguments.steps,
            "sizes": [asdict(cost) for cost in found],
        }
        with disk_errors(arguments.json):
            arguments.json.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
