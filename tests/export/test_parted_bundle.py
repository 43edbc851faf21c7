"""Bundles whose rows part late: exported, proven, told, recorded in checkpoints, measured."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tiue_export import RuntimeOptions, export_onnx, load_student, open_bundle
from tiue_export.errors import BundleError, CheckpointError
from tiue_export.export.openvino import compile_openvino
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.fan_out import FanOut
from tiue_export.student.pipeline_folder import write_scheduler

PLACE = FanOut(0, 1)


@pytest.fixture(scope="module")
def student(micro_pipeline):
    return load_student(micro_pipeline, without=("vae",))


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("fan-out") / "bundle"
    bundle = export_onnx(student, out, ExportOptions(fan_out=PLACE), allow_parity_loss=True)
    return compile_openvino(bundle)


def hops(bundle) -> list[str]:
    return [record.hop for record in bundle.manifest.parity]


def test_the_manifest_says_where_rows_part_and_what_that_costs(bundle):
    assert open_bundle(bundle.root).manifest.plan.fan_out == PLACE
    (loss,) = (record for record in bundle.manifest.parity if record.hop == "fan-out 0.1")
    assert (loss.subject, loss.gate) == ("latents / fan-out 0", 30.0)
    assert loss.inputs == "4 pictures of 2 real prompts, seeded noise"
    assert loss.value < 100
    others = [record for record in bundle.manifest.parity if record is not loss]
    assert all(record.passed for record in others)
    assert {record.gate for record in others} <= {100.0, 120.0}


@torch.no_grad()
def test_every_runtime_draws_what_the_parted_student_draws(student, bundle):
    reference = load_reference(bundle)
    noise, text = (
        torch.from_numpy(reference.arrays[name]) for name in ("sample", "encoder_hidden_states")
    )
    parted = student.by_plan(replace(student.plan, fan_out=PLACE))
    assert psnr_db(parted.sample(noise, text).numpy(), reference.arrays["latents"]) > 120
    assert psnr_db(student.sample(noise, text).numpy(), reference.arrays["latents"]) < 100
    for runtime in ("ort", "openvino"):
        options = RuntimeOptions(device="cpu", precision="fp32")
        with closing(open_runtime(runtime, bundle, options)) as opened:
            records = measure_runtime(bundle, opened, reference)
        assert all(record.passed for record in records), runtime


def test_it_goes_with_merged_rows_and_into_the_encoder(micro_pipeline, tmp_path):
    student = load_student(micro_pipeline, without=("vae", "text_encoder"))
    options = ExportOptions(fan_out=PLACE, hoist="encoder", merge_below=0.02)
    bundle = export_onnx(student, tmp_path / "bundle", options, allow_parity_loss=True)
    assert bundle.manifest.plan.rows == student.plan.rows - 1
    assert {"merged t=1", "fan-out 0.1"} < set(hops(bundle))
    assert all(r.passed for r in bundle.manifest.parity if r.hop != "fan-out 0.1")


def test_a_student_that_learned_it_is_exported_so_without_a_loss_to_judge(
    tmp_path, copied_pipeline
):
    folder = copied_pipeline
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    write_scheduler(folder, config, 4, PLACE)
    taught = load_student(folder, without=("vae", "text_encoder"))
    assert taught.plan.fan_out == PLACE
    bundle = export_onnx(taught, tmp_path / "bundle")
    assert bundle.manifest.plan.fan_out == PLACE
    assert not any("fan-out" in hop for hop in hops(bundle))
    back = export_onnx(
        taught, tmp_path / "tiue", ExportOptions(fan_out=FanOut()), allow_parity_loss=True
    )
    assert back.manifest.plan.fan_out == FanOut()
    assert "fan-out 0" in hops(back)


@pytest.fixture
def copied_pipeline(micro_pipeline, tmp_path):
    return shutil.copytree(micro_pipeline, tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ("two", "tiue_fan_out is 'two'; expected a number of up blocks"),
        ("7", "the fan-out is 7; this UNet has"),
    ],
)
def test_a_checkpoint_that_records_nonsense_is_refused(copied_pipeline, recorded, message):
    file = copied_pipeline / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text("utf-8")) | {"tiue_fan_out": recorded}
    file.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_student(copied_pipeline)


def test_a_manifest_whose_rows_part_in_several_passes_is_refused(faster_copy):
    manifest = faster_copy.manifest
    parted = replace(manifest, plan=replace(manifest.plan, fan_out=FanOut(1)))
    with pytest.raises(BundleError, match="its rows part at 1, in 3 passes"):
        type(manifest).from_json(parted.to_json(), "tiue.json")


def test_auto_tells_the_curve_and_takes_the_deepest_place_that_keeps_the_target(
    run, micro_pipeline
):
    line = (
        "onnx",
        "--ckpt",
        micro_pipeline,
        "--dry-run",
        "--out",
        "b",
        "--fan-out-curve",
        "c.json",
    )
    code, out, err = run(*line, "--fan-out", "auto:0")
    assert code == 0, err
    curve = json.loads(Path("c.json").read_text("utf-8"))
    points = curve["points"]
    gflop = [point["gflop"] for point in points]
    assert [point["fan_out"] for point in points][:2] == ["0", "0.1"]
    assert gflop == sorted(gflop, reverse=True)
    assert points[0]["psnr_db"] == 300
    # Any latents keep 0 dB but such as are as wrong as they are large.
    assert curve["taken"] == [p["fan_out"] for p in points if p["psnr_db"] >= 0][-1]
    assert "Rows that part late" in out
    assert "taken: keeps 0 dB" in out
    pytest.importorskip("matplotlib")
    picture = ("--fan-out-curve", "pictures/curve.png")
    code, out, err = run(*line[:-2], *picture, "--fan-out", "auto:250", "--json")
    assert code == 0, err
    told = json.loads(out)["fan_out_curve"]
    assert (code, told["taken"], told["target_psnr_db"]) == (0, "0", 250)
    np.testing.assert_allclose([p["gflop"] for p in told["points"]], gflop)
    assert Path("pictures/curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fan-out", "many"), "--fan-out is 'many'; expected a number of up blocks"),
        (("--fan-out", "auto:high"), "--fan-out is auto:high; expected auto, or auto:35"),
        (("--fan-out", "9"), "--fan-out is 9; this UNet has"),
        (("--fan-out", "1", "--fan-out-curve", "c.png"), "--fan-out-curve is for --fan-out auto"),
        (("--fan-out", "auto", "--fan-out-curve", "c.txt"), "ends in .png or .json"),
        (("--fan-out", "1", "--method", "faster"), "between passes every row counts"),
    ],
)
def test_a_fan_out_that_cannot_be_is_refused_in_words(run, micro_pipeline, options, message):
    code, _, err = run("onnx", "--ckpt", micro_pipeline, "--out", "b", *options)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_loss_that_fails_the_gate_names_a_smaller_fan_out(run, micro_folder, monkeypatch):
    monkeypatch.setitem(GATES_PSNR_DB, "fan-out", 200.0)
    code, _, err = run("onnx", "--ckpt", micro_folder, "--out", "b", "--fan-out", "1")
    assert code == 7
    assert "fan-out 1" in err
    assert "a smaller --fan-out" in err
