"""`tiue-export bench` on models in a loop: what is run, how often it counts, what stands beside."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from teachers import load_teacher

from tiue_export import export_onnx
from tiue_export.bundle.read import Bundle
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import UsageError
from tiue_export.graphs.flops import count_flops
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.scheduler import trajectory_of
from tiue_export.proof import latency_record as record
from tiue_export.proof.latency_request import ContenderRequest, LatencyOutputs, LatencyPlan
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import make_plan
from tiue_export.specs import CONTROLNET, TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER

PACKAGE = "tiue_export.benchmarks.latency"
contenders, loop_session, bench, session = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in ("contenders", "loop_session", "bench", "session")
)
scaling = importlib.import_module("tiue_export.benchmarks.studies.scaling")
CONFIG = load_family("tiny").scheduler


def plan_of_steps(count: int, key_steps: tuple[int, ...], max_rows: int | None = None):
    trajectory = trajectory_of(CONFIG, "ddim", count)
    known = {"steps": count, "prediction_type": "epsilon", "timestep_spacing": "leading"}
    return make_plan("ddim", trajectory, key_steps, **known, max_decoder_rows=max_rows)


@given(
    st.sets(st.integers(1, 11), max_size=5), st.sampled_from([None, 2, 6]), st.sampled_from([1, 2])
)
def test_every_loop_decodes_every_step_once(later, max_rows, batch):
    plan = plan_of_steps(12, (0, *sorted(later)), None if max_rows is None else max_rows * batch)
    found = {loop: loop_session.loop_runs(plan, loop, batch) for loop in loop_session.LOOPS}
    for runs in found.values():
        assert sum(steps * times for steps, times in runs.decoder.items()) == 12
    assert found["plan"].encoder == found["sequential"].encoder == 1 + len(later)
    assert found["every-step"].encoder == 12
    if max_rows is not None:
        assert max(found["plan"].decoder) * 2 * batch <= max_rows * batch


def names(**asked) -> list[str]:
    return [entry.name for entry in contenders.expand(ContenderRequest(**asked))]


def test_a_bundle_with_a_plan_takes_part_in_three_ways(faster_bundle):
    title = faster_bundle.root.name
    assert names(bundles=(faster_bundle,), runtimes=("ort",)) == [
        f"{title}/ort/fp32", f"{title}-sequential/ort/fp32", f"{title}-every-step/ort/fp32",
    ]  # fmt: skip


def test_a_bundle_that_follows_a_picture_says_why_it_is_not_measured(faster_bundle):
    manifest = faster_bundle.manifest
    graphs = {**manifest.graphs, CONTROLNET: manifest.graphs[UNET_ENCODER]}
    bundle = Bundle(faster_bundle.root, replace(manifest, graphs=graphs))
    asked = ContenderRequest(bundles=(bundle,), runtimes=("ort",))
    assert {entry.missing for entry in contenders.expand(asked)} == {
        "it follows a picture, which is not measured"
    }


def test_a_folder_named_like_another_bundles_loop_is_refused(faster_bundle, tiny_bundle):
    other = Bundle(faster_bundle.root.parent / f"{faster_bundle.root.name}-sequential", None)
    other = replace(other, manifest=tiny_bundle.manifest)
    with pytest.raises(UsageError, match="expected names that tell them apart"):
        contenders.bundle_titles((faster_bundle, other))


@pytest.fixture(scope="module")
def measured(faster_bundle, tmp_path_factory):
    """One round in ONNX Runtime. Shared."""
    asked = ContenderRequest(runtimes=("ort",))
    settings = record.Settings(rounds=1, runs=1, warmup=0, unet_only=False)
    plan = LatencyPlan(
        (faster_bundle.root,), asked, settings, measure_peak=False,
        outputs=LatencyOutputs(record=tmp_path_factory.mktemp("loops") / "r.json"),
    )  # fmt: skip
    outcome = bench.measure_latency(plan)
    return outcome, json.loads(plan.outputs.record.read_text("utf-8"))


def test_each_way_is_measured_by_stage_and_says_what_was_scaled(measured):
    rows = list(measured[0].record.contenders)
    assert [row.reason for row in rows] == [None] * 3
    stages = {TEXT_ENCODER, UNET_ENCODER, UNET_DECODER, "unet", VAE_DECODER, "end_to_end"}
    for row in rows:
        (turn,) = row.turns
        assert set(turn.latency_ms) == stages
        parts = [turn.latency_ms[s][0] for s in (TEXT_ENCODER, "unet", VAE_DECODER)]
        assert turn.latency_ms["end_to_end"][0] == pytest.approx(sum(parts))
    # Six steps, key steps 0, 1 and 3: groups of 1, 2 and 3 steps.
    assert [row.facts.notes[0].partition("scaled: ")[2] for row in rows] == [
        "the encoder to 3 runs, the decoder for groups of 1, 2, 3 steps to 3 runs",
        "the encoder to 3 runs, the decoder for groups of 1 steps to 6 runs",
        "the encoder to 6 runs, the decoder for groups of 1 steps to 6 runs",
    ]


@pytest.mark.slow
def test_a_half_bundle_is_fed_in_half(micro_folder, tmp_path):
    teacher = shutil.copytree(micro_folder, tmp_path / "teacher")
    file = teacher / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["tiue_steps"]
    file.write_text(json.dumps(config), "utf-8")
    planned = load_teacher(teacher, options=FasterOptions(steps=4, key_steps=(0, 2)))
    half = export_onnx(planned, tmp_path / "half", ExportOptions(precision="fp16"))
    settings = {"bundle": str(half.root), "runtime": "ort", "unet_only": True}
    for loop in loop_session.LOOPS:
        running = session.open_session("loop", {**settings, "loop": loop})
        assert set(running.run()) == {UNET_ENCODER, UNET_DECODER, "unet"}
        running.close()


def test_operations_count_the_shared_part_once_a_group(measured, faster_bundle):
    of = {steps: count_flops(faster_bundle.graph_path(UNET_DECODER), steps=steps).total
          for steps in (1, 2, 3)}  # fmt: skip
    encoder = count_flops(faster_bundle.graph_path(UNET_ENCODER)).total
    # A group's hoisted part is computed once, the rest once a step.
    assert of[3] - of[2] == of[2] - of[1] < of[1]
    plan, sequential, every_step = (row.flops for row in measured[0].record.contenders)
    assert plan[UNET_DECODER] == of[1] + of[2] + of[3]
    assert sequential[UNET_DECODER] == every_step[UNET_DECODER] == 6 * of[1]
    assert plan[UNET_ENCODER] == sequential[UNET_ENCODER] == 3 * encoder
    assert every_step["unet"] == 6 * (encoder + of[1])


def test_operations_are_those_that_torch_counts(faster_bundle, teacher_folder):
    from tiue_export.reference.sharing_cost import torch_model, unet_flops

    graphs = torch_model(load_teacher(teacher_folder)).graphs
    for name in (UNET_ENCODER, UNET_DECODER):
        counted = count_flops(faster_bundle.graph_path(name)).total
        assert counted == pytest.approx(unet_flops(graphs[name]), rel=0.02), name


def test_deepcache_runs_in_torch_and_computes_less_than_ordinary_sampling(teacher_folder):
    pytest.importorskip("DeepCache", reason="DeepCache is not installed")
    passes = {"passes": 50, "timed_passes": 3, "guided": True, "unet_only": True}
    place = {"checkpoint": str(teacher_folder), **passes}
    counts = [
        session.open_session("torch", {**place, "cache_interval": interval}).count()["unet"]
        for interval in (0, 3)
    ]
    assert counts[1] < 0.8 * counts[0]
    cached = session.open_session("torch", {**place, "cache_interval": 3})
    assert set(cached.run()) == {"unet"}
    assert set(cached.run()) == {"unet"}  # the second drawing begins with a whole pass again


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepcache/ort/fp32", "DeepCache runs in PyTorch only"),
        ("deepcache/sd-cpp/f16", "cannot run 'deepcache'"),
    ],
)
def test_deepcache_elsewhere_is_refused(tiny_bundle, name, message):
    with pytest.raises(UsageError, match=message):
        names(bundles=(tiny_bundle,), contenders=(name,), checkpoint="x")


def test_without_its_package_deepcache_keeps_its_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(contenders, "missing_modules", lambda modules: list(modules))
    asked = ContenderRequest(contenders=("deepcache",), checkpoint="x")
    (entry,) = contenders.expand(asked)
    assert entry.missing == "DeepCache is not installed (pip install DeepCache)"


# The rows of one decoder run


def sweep(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", "--no-peak", *map(str, arguments)])
    scaling.main()


def test_rows_are_swept_on_a_bundle_with_a_plan(faster_bundle, tmp_path, monkeypatch, capsys):
    files = ["--out", tmp_path / "rows.json", "--plot", tmp_path / "rows.png"]
    counts = ["--rounds", 1, "--runs", 1, "--warmup", 0]
    sweep(monkeypatch, "--bundle", faster_bundle.root, "--axis", "rows=2,6", *counts, *files)
    rows = record.read_record(tmp_path / "rows.json").by_name()
    assert list(rows) == ["rows=2/planned/ort/fp32", "rows=6/planned/ort/fp32"]
    assert "rows=6/planned/ort/fp32" in capsys.readouterr().out
    # Six steps, key steps 0, 1 and 3; a step has two rows.
    assert [row.facts.notes[0].partition("decoder ")[2] for row in rows.values()] == [
        "for groups of 1 steps to 6 runs",
        "for groups of 1, 2, 3 steps to 3 runs",
    ]
    assert all(row.peak_memory_bytes > 10**7 for row in rows.values())
    one, three = (row.flops[UNET_DECODER] for row in rows.values())
    assert three < one  # what a group shares is computed once
    with Image.open(tmp_path / "rows.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--axis", "rows=1"), "at most 1 decoder rows were allowed; one step takes 2"),
        (("--axis", "rows=2,x"), "--axis is 'rows=2,x'; expected numbers, such as rows=1,2,4"),
        (("--axis", "steps=2"), "--axis steps does not go with --bundle"),
        (("--axis", "rows=2", "--variants", "naive"), "--variants and --base are for --ckpt"),
        (("--axis", "rows=2", "--runtime", "torch"), "--bundle is measured on its graphs"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(
    faster_bundle, monkeypatch, capsys, arguments, message
):
    with pytest.raises(SystemExit) as stopped:
        sweep(monkeypatch, "--bundle", faster_bundle.root, *arguments)
    assert stopped.value.code == UsageError.exit_code
    error = capsys.readouterr().err
    assert message in error
    assert "round 1" not in error


def test_a_student_has_no_groups_to_sweep(tiny_bundle, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        sweep(monkeypatch, "--bundle", tiny_bundle.root, "--axis", "rows=2")
    assert stopped.value.code == UsageError.exit_code
    assert "is a distilled student" in capsys.readouterr().err
