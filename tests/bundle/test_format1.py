"""Bundles of format 1, which had `schedule` and `faster`: they open and draw what they drew.

`format1/bundle` was exported by the last program that wrote that format, a random student of one
level and K=4 with one row merged; `latents.npy` is what it drew of "a red fox" with seed 3.
`faster-tiue.json` is the manifest of a model in a loop: 6 steps, key steps 0, 1, 3.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tiue_export import Pipeline, RuntimeOptions, open_bundle
from tiue_export.bundle.manifest import FORMAT_VERSION, Manifest
from tiue_export.errors import BundleError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.key_step_options import FasterOptions

HERE = Path(__file__).with_name("format1")


def manifest_text(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def test_the_files_are_of_the_old_format():
    for name in ("bundle/tiue.json", "faster-tiue.json"):
        data = json.loads(manifest_text(name))
        assert data["format_version"] == 1
        assert "schedule" in data
        assert "plan" not in data


def test_a_students_bundle_opens_with_the_plan_that_its_scheduler_gives():
    bundle = open_bundle(HERE / "bundle")
    config = json.loads(bundle.file("scheduler/scheduler_config.json").read_text("utf-8"))
    assert bundle.manifest.plan == one_pass_plan(config, 4).merged(0.02)
    assert bundle.manifest.plan.merged_timesteps == (1,)
    assert bundle.manifest.format_version == FORMAT_VERSION


def test_it_draws_what_the_program_that_wrote_it_drew():
    with Pipeline.open(HERE / "bundle") as pipeline:
        drawn = pipeline("a red fox", seed=3).pictures[0].latents
    # Bit for bit on the processor it was drawn on; others round their sums in another order.
    assert psnr_db(np.load(HERE / "latents.npy"), drawn) > 120


def test_its_own_reference_still_proves_a_runtime():
    bundle = open_bundle(HERE / "bundle")
    runtime = open_runtime("ort", bundle, RuntimeOptions())
    assert all(record.passed for record in measure_runtime(bundle, runtime, load_reference(bundle)))


def test_the_manifest_of_a_loop_reads_into_the_plan_that_its_options_give():
    manifest = Manifest.from_json(manifest_text("faster-tiue.json"), "fd")
    config = json.loads(manifest_text("faster-scheduler_config.json"))
    options = FasterOptions(
        steps=6, key_steps=(0, 1, 3), inject="sequential", guidance=4.0, max_decoder_rows=6
    )
    assert manifest.plan == plan_from_config(config, options)
    assert manifest.plan.problem() is None


def test_what_is_written_again_is_of_the_new_format_and_means_the_same():
    manifest = Manifest.from_json(manifest_text("faster-tiue.json"), "fd")
    data = json.loads(manifest.to_json())
    assert data["format_version"] == FORMAT_VERSION
    assert "faster" not in data
    assert Manifest.from_json(manifest.to_json(), "fd") == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {}}, "lacks the field 'steps'"),
        ({"schedule": 7}, "lacks the field 'plan'"),
        ({"faster": {"groups": 3, "scheduler": "ddim"}}, "the plan contradicts itself: it has no"),
        ({"faster": {"groups": [4], "scheduler": "ddim"}}, "expected an object"),
    ],
)
def test_a_damaged_manifest_of_the_old_format_is_named(changes, message):
    data = {**json.loads(manifest_text("faster-tiue.json")), **changes}
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(json.dumps(data), "fd")
