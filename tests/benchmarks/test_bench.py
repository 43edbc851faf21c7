"""The benchmark: turns, statistics, operations, records; never a claim about speed itself."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from tiue_export import load_student
from tiue_export.bundle.read import open_bundle
from tiue_export.errors import CheckpointError, RegressionError, RuntimeFailure, UsageError
from tiue_export.proof import latency_record as record
from tiue_export.proof.latency_change import (
    Change,
    Ratio,
    parse_limit,
    ratio_text,
    require_not_slower,
)
from tiue_export.proof.latency_request import ContenderRequest, LatencyOutputs, LatencyPlan
from tiue_export.system.openvino_core import native_precisions

PACKAGE = "tiue_export.benchmarks"


def module(name: str):
    return importlib.import_module(f"{PACKAGE}.{name}")


bench, comparison, contenders = (
    module(f"latency.{name}") for name in ("bench", "comparison", "contenders")
)
environment, plot, process = (
    module(f"latency.{name}") for name in ("environment", "plot", "process")
)
report, session, summary, turns = (
    module(f"latency.{name}") for name in ("report", "session", "summary", "turns")
)
settings_of = module("latency.settings")
ceiling, flops, made_bundle, scaling = (
    module(name)
    for name in ("studies.ceiling", "latency.flops", "latency.made_bundle", "studies.scaling")
)
FEW = record.Settings(rounds=2, runs=2, warmup=0, unet_only=False)
UNET, WHOLE = record.UNET, record.END_TO_END


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Compiled models of a test stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def facts(**changed):
    known = {"device": "cpu", "precision": "fp32", "versions": {}, "size_px": (64, 64), "batch": 1}
    return record.Facts(**{**known, **changed})


def measured(name: str, *rounds: list[float], stage: str = WHOLE, **changed):
    """A row whose only stage took these times, in ms."""
    taken = tuple(
        record.Turn(number, {stage: tuple(runs)}) for number, runs in enumerate(rounds, 1)
    )
    row = record.Measurement(name, "made up", "graphs", {}, taken, facts=facts())
    return replace(row, **changed)


def made_record(*rows, **changed):
    here = replace(environment.describe_environment(), load_average=(0.0,))
    return replace(record.Record(here, FEW, tuple(rows)), **changed)


# Turns


def test_contenders_take_turns_round_by_round(tiny_bundle):
    taken, whole = [], []
    pair = [of_bundle(tiny_bundle, name) for name in ("a", "b")]
    turns.measure(
        pair,
        replace(FEW, rounds=2, runs=1),
        timeout_s=120,
        on_turn=lambda number, row: taken.append((number, row.name)),
        on_round=lambda number, rows: whole.append((number, [len(row.turns) for row in rows])),
    )
    assert taken == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert whole == [(1, [1, 1]), (2, [2, 2])]


def test_what_ran_last_is_unloaded_first_and_no_more_than_needed():
    gb = 10**9
    loaded = [("a", 2 * gb), ("b", 3 * gb), ("c", 4 * gb)]
    assert turns.to_unload(loaded, 2 * gb, 8 * gb) == []
    assert turns.to_unload(loaded, 4 * gb, 1 * gb) == ["c"]
    assert turns.to_unload(loaded, 7 * gb, 1 * gb) == ["c", "b"]
    assert turns.to_unload(loaded, 99 * gb, 0) == ["c", "b", "a"]
    assert turns.to_unload(loaded, 99 * gb, None) == []


@given(st.lists(st.integers(0, 10**10)), st.integers(0, 10**11), st.integers(0, 10**11))
def test_unloading_makes_room_or_leaves_nothing(sizes, needed, available):
    loaded = [(str(number), size) for number, size in enumerate(sizes)]
    chosen = turns.to_unload(loaded, needed, available)
    freed = sum(size for name, size in loaded if name in chosen)
    assert len(chosen) == len(loaded) or available + freed >= needed
    assert chosen == [name for name, _ in reversed(loaded)][: len(chosen)]


# Statistics


def test_the_spread_is_the_median_and_the_percentiles_of_all_runs():
    assert summary.spread(list(range(1, 102))) == summary.Spread(51, 11, 91, 101)
    assert summary.spread([7.0]) == summary.Spread(7, 7, 7, 1)


def test_a_ratio_compares_within_each_round_so_that_drift_cancels():
    first = [[10.0, 11.0, 10.0], [30.0, 30.0, 90.0], [20.0]]  # the machine slows down threefold
    own = [[2 * run for run in runs] for runs in first]
    ratio = summary.paired_ratio(own, first)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_a_method_divides_each_contender_in_its_own_runtime_and_precision():
    rows = {
        name: measured(name, [ms])
        for name, ms in {
            "fox/ort/fp32": 30.0,
            "fox/openvino/bf16": 10.0,
            "fox/coreml/fp16": 5.0,
            "one-step/ort/fp32": 15.0,
            "one-step/openvino/bf16": 2.0,
        }.items()
    }
    names = report.full_names(list(rows), ["one-step", "fox/ort", "one-step/openvino"])
    assert names == ("one-step/*", "fox/ort/fp32", "one-step/openvino/bf16")
    whole = made_record(*rows.values())
    text = json.loads(record.to_json(whole, summary.summarized(whole, names)))
    ratios = {name: entry["ratio_to"]["one-step/*"] for name, entry in text["summary"].items()}
    assert ratios["fox/ort/fp32"][WHOLE]["value"] == pytest.approx(2)
    assert ratios["fox/openvino/bf16"][WHOLE]["value"] == pytest.approx(5)
    assert ratios["fox/coreml/fp16"] == {}
    assert "A = one-step/* (" not in report.markdown(whole, ("fox/ort/fp32",))
    table = report.markdown(whole, names)
    assert "A = one-step/*" in table
    assert "(*: in the contender's own runtime and precision)" in table


def test_one_round_gives_a_ratio_without_an_interval():
    ratio = summary.paired_ratio([[3.0]], [[2.0]])
    assert (ratio.value, ratio.low, ratio.high) == (pytest.approx(1.5), None, None)
    assert ratio_text(ratio) == "1.5"


@pytest.mark.parametrize("ratio", [summary.paired_ratio, summary.unpaired_ratio])
def test_the_interval_covers_a_known_ratio_about_as_often_as_it_says(ratio):
    random = np.random.RandomState(0)
    true, rounds, hits = 1.3, 20, 0
    for _ in range(200):
        drift = np.exp(random.normal(0, 0.2, rounds)) if ratio is summary.paired_ratio else 1.0
        first = 10 * drift * np.exp(random.normal(0, 0.05, rounds))
        own = 10 * drift * true * np.exp(random.normal(0, 0.05, rounds))
        found = ratio([[run] for run in own], [[run] for run in first])
        hits += found.low <= true <= found.high
        assert found.low <= found.value <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_the_same_timings_give_the_same_interval():
    rounds = [[1.0, 2.0], [3.0], [2.5]]
    assert summary.paired_ratio(rounds, rounds[::-1]) == summary.paired_ratio(rounds, rounds[::-1])


def test_stages_that_only_some_turns_have_are_left_out():
    row = measured("a", [1.0], [2.0])
    first, second = row.turns
    mixed = replace(
        row, turns=(replace(first, latency_ms={**first.latency_ms, "x": (1.0,)}), second)
    )
    assert set(summary.spreads(mixed)) == {WHOLE}
    assert mixed.rounds("x") == []


def test_the_share_of_the_peak_is_operations_over_time_over_the_ceiling():
    row = measured("a", [500.0], stage=UNET, flops={UNET: 0.2e12})
    entire = made_record(row, ceilings={"fp32": record.Ceiling(0.8, "made up")})
    assert summary.achieved_tflops(row)[UNET] == pytest.approx(0.4)
    assert summary.peak_share(row, entire, UNET) == pytest.approx(0.5)
    other = replace(row, facts=facts(precision="bf16"))
    assert summary.peak_share(other, entire, UNET) is None


def test_the_clock_scales_what_was_not_run_and_adds_the_unets_parts():
    clock = session.StageClock(timed=3, total=50)
    for _ in range(3):
        clock.add("unet_encoder", 0.1, scaled=True)
        clock.add("unet_decoder", 0.2, scaled=True)
    clock.add("vae_decoder", 0.5)
    clock.whole_s = 0.9 + 0.5 + 0.01
    times = clock.latency_ms()
    assert times["unet_encoder"] == pytest.approx(5000)
    assert times[UNET] == pytest.approx(15000)
    assert times["vae_decoder"] == pytest.approx(500)
    assert times[WHOLE] == pytest.approx(15510)
    assert WHOLE not in clock.latency_ms(whole=None)


# Operations


def graph_file(tmp_path, nodes, inputs, output, weights=(), functions=()) -> Path:
    """An ONNX file from nodes, inputs {name: shape}, the output's shape, weights {name: shape}."""
    arrays = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, np.zeros(shape, np.float32).ravel())
        for name, shape in dict(weights).items()
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, output)
    graph = helper.make_graph(nodes, "g", values, [out], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_convolution_counts_two_per_multiplication_groups_and_stride_included(tmp_path):
    node = helper.make_node("Conv", ["x", "w"], ["out"], group=2, strides=[2, 2], pads=[1] * 4)
    weights = {"w": (6, 2, 3, 3)}
    path = graph_file(tmp_path, [node], {"x": (5, 4, 8, 10)}, (5, 6, 4, 5), weights)
    counted = flops.count_flops(path)
    assert counted.by_operator == {"Conv": 2 * (5 * 6 * 4 * 5) * (2 * 3 * 3)}


def test_a_transposed_convolution_counts_each_input_times_the_kernel(tmp_path):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["out"], strides=[2, 2])
    path = graph_file(tmp_path, [node], {"x": (1, 4, 3, 3)}, (1, 5, 6, 6), {"w": (4, 5, 2, 2)})
    assert flops.count_flops(path).total == 2 * (4 * 3 * 3) * (5 * 2 * 2)


@pytest.mark.parametrize(("transposed", "shape"), [(0, (7, 3)), (1, (3, 7))])
def test_a_gemm_counts_rows_times_columns_times_depth(tmp_path, transposed, shape):
    node = helper.make_node("Gemm", ["x", "w"], ["out"], transA=transposed)
    path = graph_file(tmp_path, [node], {"x": shape}, (7, 11), {"w": (3, 11)})
    assert flops.count_flops(path).by_operator == {"Gemm": 2 * 7 * 3 * 11}


def test_attention_counts_as_its_two_products_over_all_heads(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "v"], ["out"]),
    ]
    inputs = {"q": (2, 5, 16, 8), "k": (2, 5, 8, 12), "v": (2, 5, 12, 8)}
    path = graph_file(tmp_path, nodes, inputs, (2, 5, 16, 8))
    assert flops.count_flops(path).total == 2 * 2 * (2 * 5 * 16 * 12 * 8)


def test_an_open_batch_axis_takes_the_batch_that_is_asked_for(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["out"])
    path = graph_file(tmp_path, [node], {"x": ("batch", 6)}, ("batch", 4), {"w": (6, 4)})
    counted = flops.count_flops(path, batch=3)
    assert (counted.total, counted.batch) == (2 * 3 * 6 * 4, 3)


def test_a_graph_whose_shapes_stay_unknown_is_refused(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["out"])
    path = graph_file(tmp_path, [node], {"x": ("tokens", 6)}, ("tokens", 4), {"w": (6, 4)})
    with pytest.raises(UsageError, match="the shape of x, out at MatMul is unknown"):
        flops.count_flops(path)


def test_operators_that_hide_work_are_refused(tmp_path):
    node = helper.make_node("Einsum", ["x", "w"], ["out"], equation="ij,jk->ik")
    path = graph_file(tmp_path, [node], {"x": (2, 6)}, (2, 4), {"w": (6, 4)})
    with pytest.raises(UsageError, match=r"Einsum, whose work cannot be counted"):
        flops.count_flops(path)


@pytest.mark.parametrize("passes", [0, 1])
def test_the_graphs_count_as_torch_counts_the_running_modules(tiny_pipeline, tiny_bundle, passes):
    unet_passes = {"passes": passes, "timed_passes": passes}
    running = session.open_session("torch", {"checkpoint": str(tiny_pipeline), **unet_passes})
    counted = running.count()
    graphs = {name: count.total for name, count in flops.bundle_flops(tiny_bundle).items()}
    assert graphs["text_encoder"] == pytest.approx(counted["text_encoder"], rel=0.03)
    assert (
        0.7 * counted["vae_decoder"] < graphs["vae_decoder"] < counted["vae_decoder"]
    )  # sub-pixel
    if passes:
        # An ordinary pass is the encoder and one of the naive decoder's four rows.
        assert counted[UNET] > graphs["unet_encoder"]
    else:
        assert graphs["unet_encoder"] == pytest.approx(counted["unet_encoder"], rel=0.03)
        assert graphs["unet_decoder"] < counted["unet_decoder"]  # what hoisting saves
        assert counted[UNET] == counted["unet_encoder"] + counted["unet_decoder"]


def test_torch_counts_attention_on_cpus_too(tiny_pipeline):
    """By itself torch 2.13 counts none there; 3x3 convolutions and linears alone are less."""
    from torch.utils.flop_counter import FlopCounterMode

    running = session.open_session("torch", {"checkpoint": str(tiny_pipeline), "unet_only": True})
    with torch.inference_mode(), FlopCounterMode(display=False) as plain:
        running._student.encode(running._noise, running._text)
    assert running.count()["unet_encoder"] > plain.get_total_flops()


# Who takes part


def names(**asked) -> list[str]:
    return [entry.name for entry in contenders.expand(ContenderRequest(**asked))]


def test_a_bundle_runs_on_all_it_can_and_each_precision_is_named(compiled_bundle):
    pytest.importorskip("openvino")
    expected = ["tiny-fp32/ort/fp32", "tiny-fp32/openvino/fp32"]
    expected += ["tiny-fp32/openvino/bf16"] if "bf16" in native_precisions() else []
    assert names(bundles=(compiled_bundle,)) == expected


def test_on_a_machine_where_core_ml_draws_its_packages_are_measured_too(
    compiled_bundle, monkeypatch
):
    forms = compiled_bundle.manifest.compiled
    packages = replace(forms["openvino"], backend="coreml", flags={"precision": "fp16"})
    both = replace(
        compiled_bundle,
        manifest=replace(compiled_bundle.manifest, compiled={**forms, "coreml": packages}),
    )
    mac = replace(contenders.BACKENDS["coreml"], automatic=True, needs=())
    monkeypatch.setattr(contenders, "BACKENDS", {**contenders.BACKENDS, "coreml": mac})
    here = ["tiny-fp32/ort/fp32", *(n for n in names(bundles=(both,)) if "openvino" in n)]
    assert names(bundles=(both,)) == [*here, "tiny-fp32/coreml/auto"]
    assert names(bundles=(compiled_bundle,)) == here
    elsewhere = replace(mac, automatic=False)  # the evaluator: a proof, not a way to draw
    monkeypatch.setattr(contenders, "BACKENDS", {**contenders.BACKENDS, "coreml": elsewhere})
    assert names(bundles=(both,)) == here


def test_engines_of_either_flavour_are_measured_on_trt(compiled_bundle):
    forms = compiled_bundle.manifest.compiled
    engines = replace(forms["openvino"], backend="trt")
    for folder in ("trt", "trt-rtx"):
        manifest = replace(compiled_bundle.manifest, compiled={folder: engines})
        bundle = replace(compiled_bundle, manifest=manifest)
        assert names(bundles=(bundle,)) == ["tiny-fp32/ort/fp32", "tiny-fp32/trt/fp32"]


def test_runtimes_and_precisions_can_be_chosen(compiled_bundle):
    asked = {"bundles": (compiled_bundle,), "precisions": ("bf16",)}
    assert names(**asked, runtimes=("openvino",)) == ["tiny-fp32/openvino/bf16"]
    assert names(**asked, runtimes=("torch", "ort")) == [
        "tiny-fp32/torch/fp32",
        "tiny-fp32/ort/fp32",
    ]


def test_names_stand_in_the_order_they_were_asked_for_and_once(tiny_bundle):
    asked = ("one-step/torch/bf16", "bundles", "official", "naive/torch/fp32", "bundles")
    assert names(bundles=(tiny_bundle,), contenders=asked, runtimes=("ort",)) == [
        "one-step/torch/bf16", "tiny-fp32/ort/fp32", "naive/torch/fp32",
    ]  # fmt: skip


def test_samplers_without_a_lane_run_where_the_bundles_do_and_in_torch(tiny_bundle):
    asked = {"bundles": (tiny_bundle,), "runtimes": ("ort",), "contenders": ("four-step",)}
    assert names(**asked) == ["four-step/torch/fp32", "four-step/ort/fp32"]


def test_all_means_every_contender_the_optional_ones_too(tiny_bundle):
    found = names(bundles=(tiny_bundle,), contenders=("all",), runtimes=("ort",), checkpoint="x")
    assert {name.rpartition("/")[0] for name in found} == {
        "naive/torch", "naive/torch-compile", "tiny-fp32/ort", "rows-2/torch", "rows-8/torch",
        "rows-16/torch", "one-step/torch", "one-step/ort", "four-step/torch", "four-step/ort",
        "fifty-step/torch", "deepcache/torch", "one-step/sd-cpp",
    }  # fmt: skip


def test_without_weights_a_contender_keeps_its_row_and_says_so(tiny_bundle):
    asked = ContenderRequest((tiny_bundle,), contenders=("official", "rows-8", "one-step/ort/fp32"))
    found = contenders.expand(asked)
    assert {entry.missing for entry in found} == {"it needs the weights: give --ckpt"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_torch_draws_in_every_precision_that_it_is_measured_in(tiny_pipeline, precision):
    names = (f"naive/torch/{precision}", f"four-step/torch/{precision}")
    for entry in contenders.expand(
        ContenderRequest(contenders=names, checkpoint=str(tiny_pipeline), unet_only=True)
    ):
        running = session.open_session(entry.settings.kind, vars(entry.settings))
        assert running.run()[UNET] > 0
        assert running.facts.precision == precision


def test_on_a_gpu_stable_diffusion_cpp_says_that_it_is_measured_on_the_cpu():
    (entry,) = contenders.expand(
        ContenderRequest(contenders=("one-step/sd-cpp/f16",), checkpoint="x", device="cuda")
    )
    assert entry.missing == "stable-diffusion.cpp is measured on the CPU only, not on cuda"


def test_an_absent_stable_diffusion_cpp_is_a_reason_not_an_error(tiny_bundle):
    if importlib.util.find_spec("stable_diffusion_cpp") is not None:
        pytest.skip("it is installed here")
    (entry,) = contenders.expand(
        ContenderRequest(contenders=("one-step/sd-cpp/q8_0",), checkpoint="x")
    )
    assert entry.missing.startswith("stable-diffusion.cpp is not installed")


def test_guidance_runs_on_graphs_of_twice_the_batch(tiny_bundle):
    (entry,) = contenders.expand(
        ContenderRequest((tiny_bundle,), ("fifty-step/ort/fp32",), checkpoint="x")
    )
    assert entry.made["bundle"].batch == 1
    assert (entry.made["unet_bundle"].batch, entry.made["unet_bundle"].unet_only) == (2, True)
    assert (entry.settings.passes, entry.settings.timed_passes) == (50, 3)
    assert "3 passes timed at batch 2, scaled to 50" in entry.what


def test_contenders_of_two_runtimes_share_the_graphs_that_are_made_for_them(tiny_bundle):
    names = ("one-step/ort/fp32", "one-step/openvino/fp32", "fifty-step/ort/fp32", "four-step/ort")
    one, other, fifty, four = contenders.expand(
        ContenderRequest((tiny_bundle,), names, checkpoint="x", unet_only=True)
    )
    assert one.made["bundle"] == other.made["bundle"] == fifty.made["bundle"]
    assert four.made["bundle"] == replace(one.made["bundle"], turbo_steps=4, forms=())
    assert one.made["bundle"].forms == ("openvino",)
    assert fifty.made["unet_bundle"].forms == ()  # of another batch: nobody shares it


@pytest.mark.parametrize(
    ("runtime", "forms"), [("ort", ()), ("openvino", ("openvino",))], ids=["ort", "openvino"]
)
def test_graphs_are_made_only_in_the_forms_that_are_measured(runtime, forms):
    asked = ContenderRequest(contenders=(f"one-step/{runtime}/fp32",), checkpoint="x")
    (entry,) = contenders.expand(asked)
    assert entry.made["bundle"].forms == forms


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two-step", "unknown contender 'two-step'"),
        ("one-step/onnx/fp32", "unknown runtime 'onnx'"),
        ("one-step/torch/fp8", "unknown precision of PyTorch 'fp8'"),
        ("one-step/sd-cpp/q9", "unknown weights of stable-diffusion.cpp 'q9'"),
        ("naive/sd-cpp/f16", "stable-diffusion.cpp cannot run 'naive'"),
        ("rows-8/ort/fp32", "rows-8/ort/fp32: rows-8 is measured in PyTorch only"),
        ("one-step/torch/fp32/x", "has too many parts"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_runs(tiny_bundle, name, message):
    with pytest.raises(UsageError, match=message):
        names(bundles=(tiny_bundle,), contenders=(name,), checkpoint="x")


def test_bundles_of_one_name_are_told_apart_and_the_same_twice_is_refused(tiny_bundle, tmp_path):
    other = open_bundle(shutil.copytree(tiny_bundle.root, tmp_path / "other" / "tiny-fp32"))
    found = names(bundles=(tiny_bundle, other), runtimes=("ort",))
    assert found[1] == "other-tiny-fp32/ort/fp32"
    with pytest.raises(UsageError, match="expected names that tell them apart"):
        names(bundles=(tiny_bundle, tiny_bundle))


def test_nothing_to_measure_says_what_to_give():
    with pytest.raises(UsageError, match="there is nothing to measure") as caught:
        names()
    assert caught.value.next_step == "Give a bundle, or --ckpt with --contenders."


# A whole run, on tiny models


@pytest.fixture(scope="module")
def outcome(compiled_bundle, tiny_pipeline, tmp_path_factory):
    """One run with contenders that succeed, fail and are missing. Shared."""
    folder = tmp_path_factory.mktemp("bench")
    asked = ContenderRequest(
        contenders=("bundles", "one-step/torch/fp32", "fifty-step/torch/bf16", "sd-cpp"),
        runtimes=("ort", "openvino"),
        precisions=("fp32", "fp8"),
        checkpoint=str(tiny_pipeline),
    )
    outputs = LatencyOutputs(folder / "r.json", folder / "r.md", folder / "plots" / "r.png")
    plan = LatencyPlan(
        (compiled_bundle.root,), asked, FEW, ("tiny-fp32/ort",), ("fp32=0.5",), outputs=outputs
    )
    lines: list[str] = []
    return bench.measure_latency(plan, lines.append), outputs, lines


def test_every_contender_has_its_row_measured_or_with_the_reason(outcome):
    rows = outcome[0].record.by_name()
    assert list(rows) == [
        "tiny-fp32/ort/fp32",
        "tiny-fp32/openvino/fp32",
        "tiny-fp32/openvino/fp8",
        "one-step/torch/fp32",
        "fifty-step/torch/bf16",
        "one-step/sd-cpp/f16",
        "one-step/sd-cpp/q8_0",
    ]
    assert "unknown precision 'fp8'" in rows["tiny-fp32/openvino/fp8"].reason
    for name in ("tiny-fp32/ort/fp32", "tiny-fp32/openvino/fp32", "one-step/torch/fp32"):
        assert rows[name].measured, rows[name].reason


def test_a_measured_row_has_all_stages_rounds_and_circumstances(outcome):
    row = outcome[0].record.by_name()["tiny-fp32/ort/fp32"]
    assert [turn.round for turn in row.turns] == [1, 2]
    for turn in row.turns:
        assert set(turn.latency_ms) == set(record.STAGES)
        assert all(len(runs) == 2 and min(runs) > 0 for runs in turn.latency_ms.values())
        parts = np.add(turn.latency_ms["unet_encoder"], turn.latency_ms["unet_decoder"])
        np.testing.assert_allclose(parts, turn.latency_ms[UNET])
    assert row.facts.versions["onnxruntime"]
    assert (row.facts.size_px, row.facts.batch) == ((64, 64), 1)
    assert row.peak_memory_bytes >= (row.run_peak_memory_bytes or 0)
    assert row.flops[UNET] == row.flops["unet_encoder"] + row.flops["unet_decoder"] > 0


def test_ordinary_passes_in_torch_are_one_stage_and_scaled_where_said(outcome):
    rows = outcome[0].record.by_name()
    one, fifty = rows["one-step/torch/fp32"], rows["fifty-step/torch/bf16"]
    assert set(summary.spreads(one)) == {"text_encoder", UNET, "vae_decoder", WHOLE}
    assert fifty.flops[UNET] == pytest.approx(100 * one.flops[UNET])
    turn = fifty.turns[0].latency_ms
    assert turn[WHOLE][0] >= turn[UNET][0] > 0


def test_all_contenders_ran_the_same_weights(outcome):
    shas = {row.facts.weights_sha256 for row in outcome[0].record.contenders if row.facts}
    assert len(shas) == 1
    assert not any("same weights" in text for text in outcome[0].record.warnings)


def test_the_record_comes_back_from_its_file_as_it_was(outcome):
    assert record.read_record(outcome[1].record) == outcome[0].record
    data = json.loads(outcome[1].record.read_text("utf-8"))
    assert data["environment"]["cores"] >= 1
    assert data["environment"]["packages"]["onnxruntime"]
    row = data["summary"]["tiny-fp32/openvino/fp32"]
    assert set(row["ratio_to"]) == {"tiny-fp32/ort/fp32"}
    assert row["latency"][UNET]["runs"] == 4
    assert data["summary"]["tiny-fp32/openvino/fp8"]["latency"] == {}


def test_the_markdown_has_a_line_for_every_contender_and_why_some_have_no_numbers(outcome):
    text = outcome[1].markdown.read_text("utf-8")
    for name in outcome[0].record.by_name():
        assert text.count(f"\n| {name} |") == 1
    assert "not measured: unknown precision 'fp8'" in text
    assert "A = tiny-fp32/ort/fp32" in text
    assert "peak fp32: 0.50 TFLOP/s (given with --peak)" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_plot_is_a_picture(outcome):
    with Image.open(outcome[1].plot) as image:
        assert min(image.size) > 300


def test_progress_is_told_turn_by_turn(outcome):
    # Whether sd.cpp is installed decides whether it takes a turn.
    told = [line for line in outcome[2] if line.startswith("round ") and "sd-cpp" not in line]
    assert re.match(r"round 1 of 2, \d+ \w+ left  tiny-fp32/ort/fp32: unet ", told[0])
    assert told[-1].startswith("round 2 of 2  ")
    # Two rounds of four contenders, one that failed once; those that are missing take no turn.
    assert len(told) == 2 * 4 + 1


def test_a_record_whose_sizes_or_weights_differ_says_so():
    rows = [measured("a", [1.0], facts=facts(weights_sha256="1", batch=2, text_tokens=77))]
    rows += [measured("b", [1.0], facts=facts(weights_sha256="2", text_tokens=154))]
    warnings = report.standing_warnings(made_record(*rows))
    assert "the contenders do not run the same weights" in warnings
    assert "the contenders do not draw pictures of one size and batch" in warnings
    assert any("texts of one length (--max-prompt-tokens)" in warning for warning in warnings)


def test_a_busy_machine_is_named():
    busy = replace(environment.describe_environment(), load_average=(7.5, 1, 1), cores=2)
    assert busy.is_busy
    (warning,) = report.standing_warnings(replace(made_record(), environment=busy))
    assert "load 7.5 on 2 cores" in warning
    row = measured("a", [1.0])
    disturbed = replace(row, turns=(replace(row.turns[0], others_cpu=0.4),))
    (warning,) = report.standing_warnings(made_record(disturbed))
    assert warning == "other processes took up to 40% of the CPU during a turn"


# Contenders that fail


def of_bundle(bundle, name: str = "fox/ort/fp32"):
    opened = settings_of.GraphSettings(bundle=str(bundle.root), runtime="ort")
    return contenders.Contender(name, "a bundle", opened)


def children() -> list[int]:
    """The worker processes that this test has started, found by their parent."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            command = (status.parent / "cmdline").read_bytes()
        except OSError:  # it ended while we looked
            continue
        if int(lines["PPid"]) == os.getpid() and b"latency.worker" in command:
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_contender_whose_process_is_killed_is_reported_with_the_signal(tiny_bundle):
    def kill(number: int, row: object) -> None:
        for pid in children():
            os.kill(pid, signal.SIGKILL)

    (row,) = turns.measure([of_bundle(tiny_bundle)], FEW, timeout_s=120, on_turn=kill)
    assert not row.measured
    assert len(row.turns) == 1
    assert "its process was killed (SIGKILL: most often memory ran out)" in row.reason
    assert row.reason.endswith("(in round 2)")


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_process_that_died_beside_others_gets_a_second_try_alone(tiny_bundle):
    alive: list[int] = []

    def kill(number: int, row: object) -> None:
        alive.append(len(children()))
        if len(alive) == 2:
            os.kill(min(children()), signal.SIGKILL)

    pair = [of_bundle(tiny_bundle, name) for name in ("a", "b")]
    rows = turns.measure(pair, FEW, timeout_s=120, on_turn=kill)
    assert [row.reason for row in rows] == [None, None]
    assert alive == [1, 2, 1, 2]
    assert children() == []


def test_ctrl_c_keeps_the_rounds_that_were_whole(tiny_bundle):
    def interrupt(number: int, row: turns.Measurement) -> None:
        if (number, row.name) == (stop_in, "a"):
            raise KeyboardInterrupt

    pair = [of_bundle(tiny_bundle, name) for name in ("a", "b")]
    settings = replace(FEW, rounds=3, runs=1)
    stop_in = 3
    rows = turns.measure(pair, settings, timeout_s=120, on_turn=interrupt)
    assert [[turn.round for turn in row.turns] for row in rows] == [[1, 2], [1, 2]]
    stop_in = 1
    with pytest.raises(KeyboardInterrupt):
        turns.measure(pair, settings, timeout_s=120, on_turn=interrupt)
    assert children() == []


def test_the_command_writes_what_ctrl_c_left_and_ends_with_130(
    run, tiny_bundle, tmp_path, monkeypatch
):
    whole = turns.measure

    def stopped(contenders, settings, **more):
        return whole(contenders, replace(settings, rounds=1), **more)

    monkeypatch.setattr(bench, "measure", stopped)
    arguments = ["--rounds", 2, "--runs", 1, "--no-peak", "--unet-only", "--out", "r.json"]
    code, out, err = run("bench", tiny_bundle.root, *arguments)
    assert code == 130, err
    assert "stopped by Ctrl-C after 1 of 2 rounds" in " ".join(out.split())
    assert "the rounds that were whole are reported and written" in " ".join(err.split())
    written = record.read_record(tmp_path / "r.json")
    assert written.settings.rounds == 1
    assert written.warnings[-1] == "stopped by Ctrl-C after 1 of 2 rounds"


def test_a_killed_run_leaves_its_whole_rounds_and_resume_takes_the_others(
    run, tiny_bundle, tmp_path, monkeypatch
):
    words = ("bench", tiny_bundle.root, "--runs", 1, "--no-peak", "--unet-only", "--rounds", 3)
    path = tmp_path / "r.json"
    take = turns._take_turn

    def killed(pool, row, number, settings):
        if number == 3:
            raise RuntimeError("killed")
        return take(pool, row, number, settings)

    monkeypatch.setattr(turns, "_take_turn", killed)
    code, _, _ = run(*words, "--out", path)
    assert code not in (0, 130)
    left = record.read_record(path)
    assert (left.settings.rounds, left.warnings[-1]) == (2, "unfinished: 2 of 3 rounds")
    numbers = []

    def counted(pool, row, number, settings):
        numbers.append(number)
        return take(pool, row, number, settings)

    monkeypatch.setattr(turns, "_take_turn", counted)
    code, _, err = run(*words, "--out", path, "--resume")
    assert code == 0, err
    assert "r.json holds 2 of 3 rounds" in " ".join(err.split())
    whole = record.read_record(path)
    assert set(numbers) == {3}
    assert whole.settings.rounds == 3
    assert not any("unfinished" in warning for warning in whole.warnings)
    assert whole.environment == left.environment
    for row, before in zip(whole.contenders, left.contenders, strict=True):
        assert row.turns[:2] == before.turns
        assert [turn.round for turn in row.turns] == [1, 2, 3]
    code, out, err = run(*words, "--out", path, "--resume", "--json")
    assert (code, set(numbers)) == (0, {3}), err  # nothing was left to measure
    assert json.loads(out)["settings"]["rounds"] == 3


def test_resume_refuses_a_record_of_something_else(run, tiny_bundle, tmp_path):
    words = ("bench", tiny_bundle.root, "--no-peak", "--unet-only", "--runtime", "ort")
    path = tmp_path / "r.json"
    code, _, err = run(*words, "--resume")
    assert (code, "--resume goes on with a record, and --out names none" in err) == (2, True), err
    code, _, err = run(*words, "--rounds", 1, "--runs", 1, "--out", path, "--resume")
    assert (code, "nothing to resume, so this begins" in " ".join(err.split())) == (0, True), err
    code, _, err = run(*words, "--rounds", 2, "--runs", 2, "--out", path, "--resume")
    told = " ".join(err.split())
    assert (code, "was measured with other runs" in told) == (2, True), err
    assert "leave --resume out" in told
    kept = path.read_text()
    other = json.loads(kept)
    other["contenders"][0]["facts"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(other))
    code, _, err = run(*words, "--rounds", 2, "--runs", 1, "--out", path, "--resume")
    told = " ".join(err.split())
    assert (code, "is not what the earlier rounds measured: its weights_sha256" in told) == (
        2,
        True,
    ), err
    assert json.loads(path.read_text()) == other


def test_a_turn_says_how_long_the_others_will_take(monkeypatch):
    told, clock = [], iter([0.0, 10.0, 40.0, 60.0, 80.0])
    monkeypatch.setattr(bench.time, "monotonic", lambda: next(clock))
    teller = bench._Teller(2, record.Settings(2, 1, 0, unet_only=True), told.append)
    row = turns.Measurement("a", "", "graph", {}, (record.Turn(1, {"unet": (5.0,)}),))
    for number, name in ((1, "a"), (1, "b"), (2, "a"), (2, "b")):
        teller.turn_taken(number, replace(row, name=name))
    assert [line.partition("  ")[0] for line in told] == [
        "round 1 of 2, 30 s left",
        "round 1 of 2, 40 s left",
        "round 2 of 2, 25 s left",
        "round 2 of 2",
    ]


def test_reloading_keeps_one_process_at_a_time(tiny_bundle):
    alive = []
    pair = [of_bundle(tiny_bundle, name) for name in ("a", "b")]
    turns.measure(
        pair,
        replace(FEW, reload=True, runs=1),
        timeout_s=120,
        on_turn=lambda number, row: alive.append(len(children())),
    )
    assert set(alive) == ({1} if sys.platform == "linux" else {0})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("mapped_bytes", "most_alive"), [(0, 2), (10**10, 1)])
def test_weights_that_are_mapped_are_not_taken_for_free_memory(
    tiny_bundle, monkeypatch, mapped_bytes, most_alive
):
    monkeypatch.setattr(turns, "available_memory_bytes", lambda: 10**10)
    monkeypatch.setattr(turns, "mapped_file_bytes", lambda pid: mapped_bytes)
    alive = []
    pair = [of_bundle(tiny_bundle, name) for name in ("a", "b")]
    rows = turns.measure(
        pair, FEW, timeout_s=120, on_turn=lambda number, row: alive.append(len(children()))
    )
    assert max(alive) == most_alive
    assert [row.reason for row in rows] == [None, None]


def test_an_answer_that_takes_too_long_ends_the_contender(tiny_bundle):
    (row,) = turns.measure([of_bundle(tiny_bundle)], FEW, timeout_s=0.01)
    assert row.reason == "it gave no answer within 0 s"


def test_what_a_contender_raises_is_its_reason(tiny_bundle, tmp_path):
    root = shutil.copytree(tiny_bundle.root, tmp_path / "bundle")
    (root / "vae_decoder" / "model.onnx").unlink()
    (row,) = turns.measure([of_bundle(replace(tiny_bundle, root=root))], FEW, timeout_s=120)
    assert "model.onnx" in row.reason
    assert row.turns == ()


def test_graphs_that_cannot_be_made_are_a_reason(tmp_path):
    asked = made_bundle.MadeBundle(str(tmp_path / "nothing.safetensors"), turbo_steps=1)
    settings = settings_of.GraphSettings(bundle=None, runtime="ort")
    entry = contenders.Contender("x", "x", settings, {"bundle": asked})
    told: list[str] = []
    ready = bench.ready(entry, tmp_path / "work", told.append)
    assert ready.missing.startswith("its graphs could not be made: ")
    assert "nothing.safetensors" in ready.missing
    assert told == ["x: making its graphs"]


@pytest.mark.slow
def test_one_ordinary_pass_as_graphs_is_the_unet_and_its_one_step_formula(micro_pipeline, tmp_path):
    student = load_student(micro_pipeline)
    asked = made_bundle.MadeBundle(str(micro_pipeline), turbo_steps=1, unet_only=True)
    made = open_bundle(made_bundle.made(asked, tmp_path))
    assert made_bundle.made(asked, tmp_path) == made.root  # not made again
    manifest = made.manifest
    assert (manifest.plan.timesteps, manifest.plan.rows) == ((999,), 1)
    assert all(entry.passed for entry in manifest.parity)
    assert (manifest.plan.recipe, manifest.plan.steps) == ("sd-turbo", 1)
    from tiue_export.proof.parity import load_reference

    known = {name: torch.from_numpy(a) for name, a in load_reference(made).arrays.items()}
    noise, text = known["sample"], known["encoder_hidden_states"]
    with torch.no_grad():
        output = student.unet(manifest.plan.passes[0].input.noise * noise, 999, text).sample
    schedule = manifest.plan
    latents = schedule.latents.noise * noise + schedule.latents.outputs[0] * output
    torch.testing.assert_close(latents, known["latents"], rtol=1e-4, atol=1e-3)
    whole = {"checkpoint": str(micro_pipeline), "passes": 1, "timed_passes": 1, "unet_only": True}
    counted = session.open_session("torch", whole).count()[UNET]
    graphs = sum(count.total for count in flops.bundle_flops(made).values())
    assert graphs == pytest.approx(counted, rel=0.03)


@pytest.mark.slow
def test_a_made_bundle_parts_its_rows_where_it_is_asked_to(micro_pipeline, tmp_path):
    asked = made_bundle.MadeBundle(str(micro_pipeline), fan_out="1", unet_only=True)
    parted = open_bundle(made_bundle.made(asked, tmp_path)).manifest
    assert str(parted.plan.fan_out) == "1"
    assert all(entry.passed for entry in parted.parity)
    assert not any(entry.hop.startswith("fan-out") for entry in parted.parity)
    with pytest.raises(UsageError, match="an ordinary pass has one row"):
        made_bundle.make(replace(asked, turbo_steps=1), tmp_path / "both")


# Comparing


@pytest.fixture
def files(tmp_path):
    """Write records with one row "a" of a given speed, and other rows: their paths."""

    def write(name: str, factor: float | None, *more: object) -> Path:
        rows = [measured("b", [5.0, 5.1], [5.0, 5.2]), *more]
        if factor is not None:
            rows.insert(0, measured("a", *([factor * t, factor * t] for t in (10.0, 10.2, 9.9))))
        path = tmp_path / f"{name}.json"
        path.write_text(record.to_json(made_record(*rows), {}), "utf-8")
        return path

    return write


def test_an_unchanged_record_passes_the_check(run, files):
    code, out, _ = run("bench", "--compare", files("x", 1), files("y", 1), "--fail-if-slower", "5%")
    assert code == 0
    assert "Now against before" in out


def test_a_slower_contender_fails_the_check_with_exit_code_11_and_is_named(run, files):
    code, out, err = run(
        "bench", "--compare", files("x", 1), files("y", 1.2), "--fail-if-slower", "5%"
    )
    assert code == RegressionError.exit_code == 11
    assert "1 of 2 are slower by more than 5 %: a, end_to_end: 1.2" in err
    assert "12" in out


@pytest.mark.parametrize(("factor", "limit"), [(1.04, "5%"), (1.2, "25"), (0.5, "0%")])
def test_a_change_within_the_limit_passes(run, files, factor, limit):
    paths = files("x", 1), files("y", factor)
    assert run("bench", "--compare", *paths, "--fail-if-slower", limit)[0] == 0


def test_noise_between_rounds_is_no_regression():
    noisy = Change("a", WHOLE, 10, 11, Ratio(1.1, 0.9, 1.3))
    certain = Change("a", WHOLE, 10, 11, Ratio(1.1, 1.05, 1.2))
    assert not noisy.is_slower(0.05)
    assert certain.is_slower(0.05)
    require_not_slower([noisy], 0.05)


def test_a_contender_that_vanished_or_fails_now_fails_the_check(run, files):
    before = files("x", 1)
    code, _, err = run("bench", "--compare", before, files("y", None), "--fail-if-slower", "5%")
    assert (code, "a: not in the record now" in err) == (11, True)
    broken = measured("a", reason="its process died")
    code, _, err = run(
        "bench", "--compare", before, files("z", None, broken), "--fail-if-slower", "5%"
    )
    assert (code, "not measured now: its process died" in err) == (11, True)
    # One that is new, or was not measured before either, cannot have become slower.
    assert run("bench", "--compare", files("y", None), before, "--fail-if-slower", "5%")[0] == 0


def test_a_comparison_is_json_and_markdown_too_and_names_what_else_differs(run, files, tmp_path):
    before, now = files("x", 1), files("y", 2)
    data = json.loads(now.read_text("utf-8"))
    data["environment"]["cpu"] = "another"
    now.write_text(json.dumps(data), "utf-8")
    code, out, _ = run("bench", "--compare", before, now, "--json", "--markdown", "c.md")
    printed = json.loads(out)
    assert code == 0
    assert printed["changes"][0]["ratio"]["value"] == pytest.approx(2)
    assert [text for text in printed["environment"] if text.endswith("-> another")]
    assert "| a | end_to_end | 10 | 20 | 2 " in (tmp_path / "c.md").read_text("utf-8")


def test_bundles_of_one_run_are_held_against_the_first_in_the_same_lane():
    rows = [
        measured("old/ort/fp32", [10.0], [30.0]),
        measured("old/openvino/bf16", [4.0], [4.0]),
        measured("new/ort/fp32", [11.0], [33.0]),
        measured("new/torch/fp32", [50.0], [50.0]),
        measured("naive/torch/fp32", [50.0], [50.0]),
    ]
    (change,) = comparison.compare_with_first_bundle(made_record(*rows), ["old", "new"])
    assert (change.name, change.ratio.value) == ("new/ort/fp32", pytest.approx(1.1))
    with pytest.raises(RegressionError, match=r"new/ort/fp32, end_to_end: 1\.1"):
        require_not_slower([change], 0.05)


@pytest.mark.parametrize("text", ["fast", "-1%", "5%%", ""])
def test_a_limit_that_is_no_percentage_is_refused(text):
    with pytest.raises(UsageError, match="expected a percentage such as 5%"):
        parse_limit(text)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 1}', '{"format_version": 9}']
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content, "utf-8")
    with pytest.raises(UsageError, match=r"record\.json (is no record|has format version)"):
        record.read_record(path)


def test_a_record_that_is_not_there_says_how_to_make_one(run):
    code, _, err = run("bench", "--compare", "a.json", "b.json")
    assert code == UsageError.exit_code
    assert "tiue-export bench BUNDLE --out record.json" in err


# The command


def test_the_command_prints_the_record_as_one_json_object(run, tiny_bundle):
    arguments = ["--rounds", 1, "--runs", 1, "--warmup", 0, "--no-peak", "--unet-only", "--json"]
    code, out, err = run("bench", tiny_bundle.root, *arguments)
    assert (code, err) == (0, "")
    (row,) = json.loads(out)["contenders"]
    assert row["name"] == "tiny-fp32/ort/fp32"
    assert set(row["turns"][0]["latency_ms"]) == {"unet_encoder", "unet_decoder", "unet"}


def test_the_command_prints_a_table_and_why_a_row_is_missing(run, tiny_bundle):
    code, out, err = run(
        "bench", tiny_bundle.root, "--contenders", "bundles,official", "--rounds", 1, "--runs", 1,
        "--no-peak",
    )  # fmt: skip
    assert code == 0
    assert "tiny-fp32/ort/fp32" in out
    assert "naive/torch/fp32: not measured: it needs the weights: give --ckpt" in out
    assert "round 1 of 1  tiny-fp32/ort/fp32" in err


def test_a_run_without_any_measured_row_fails(run, tiny_bundle):
    code, _, err = run("bench", tiny_bundle.root, "--contenders", "official", "--no-peak")
    assert code == RuntimeFailure.exit_code
    assert "nothing could be measured" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", 0], "--rounds is 0; expected 1 or more"),
        (["--runs", 0], "--runs is 0; expected 1 or more"),
        (["--warmup", -1], "--warmup is -1; expected 0 or more"),
        (["--threads", 0], "--threads is 0; expected 1 or more"),
        (["--timeout", 0], "--timeout is 0.0; expected seconds above 0"),
        (["--ratio-to", "x"], "--ratio-to 'x' fits 0 of the contenders tiny-fp32/ort/fp32"),
        (["--peak", "bf16"], "expected PRECISION=TFLOPS, such as --peak bf16=1.1"),
        (["--peak", "bf16=0"], "expected PRECISION=TFLOPS"),
        (["--fail-if-slower", "5%"], "--fail-if-slower compares bundles with the first one"),
        (["--runtime", "onnx"], "unknown runtime 'onnx'"),
        (["--runtime", "qnn"], "bench measures time, and the Snapdragon NPU is emulated here"),
        (["--compare", "a", "b"], "--compare takes two records and no bundle"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(run, tiny_bundle, arguments, message):
    code, _, err = run("bench", tiny_bundle.root, *arguments)
    assert (code, message in err) == (UsageError.exit_code, True), err


# Ceilings, scaling, stable-diffusion.cpp's log


def test_ceilings_are_above_zero_and_say_what_measured_them():
    found = ceiling.measure_ceilings(1, seconds=0.001)
    assert found["fp32"].tflops > 0
    assert all(value.measured_by for value in found.values())


def test_points_of_a_sweep_differ_in_one_thing_alone():
    sweep = scaling.Sweep(
        "x", None, "ort", "fp32", (("steps", (2, 4)), ("size", (64,))), ("naive", "merged")
    )
    points = {point.name: point for point in scaling.contenders(sweep)}
    assert list(points) == [
        "steps=2/naive/ort/fp32", "steps=2/merged/ort/fp32",
        "steps=4/naive/ort/fp32", "steps=4/merged/ort/fp32",
        "size=64/naive/ort/fp32", "size=64/merged/ort/fp32",
    ]  # fmt: skip
    naive, merged = (
        points[f"steps=4/{variant}/ort/fp32"].made["bundle"] for variant in ("naive", "merged")
    )
    assert (naive.steps, naive.hoist, naive.merge_below) == (4, "none", 0)
    assert naive.upsampling == "nearest"  # as the official path
    assert merged == replace(naive, hoist="decoder", merge_below=0.02, upsampling="subpixel")
    small = points["size=64/naive/ort/fp32"].made["bundle"]
    assert small == replace(naive, steps=None, height=64, width=64)


@pytest.mark.parametrize("text", ["steps", "steps=", "steps=0", "steps=2,", "steps=a"])
def test_an_axis_without_numbers_is_refused(text):
    with pytest.raises(UsageError, match="expected numbers, such as steps=1,2,4"):
        scaling.parse_axis(text)
    with pytest.raises(UsageError, match="unknown axis 'colour'"):
        scaling.parse_axis("colour=1")


@pytest.mark.parametrize("option", ["--plot", "--out"])
def test_a_sweep_that_could_not_be_written_is_refused_at_its_start(
    tmp_path, monkeypatch, capsys, option
):
    arguments = ["scaling", "--ckpt", "nowhere", "--axis", "steps=2", option, str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stopped:
        scaling.main()
    assert stopped.value.code == UsageError.exit_code
    assert capsys.readouterr().err.startswith(f"error: {option} {tmp_path} is a folder")


@pytest.mark.slow
def test_a_sweep_in_torch_is_measured_written_and_drawn(micro_pipeline, tmp_path):
    command = [sys.executable, "-m", f"{PACKAGE}.studies.scaling"]
    command += ["--ckpt", str(micro_pipeline), "--runtime", "torch"]
    command += ["--axis", "steps=2,3", "--rounds", "1", "--runs", "1"]
    command += ["--peak", "fp32=0.5"]
    command += ["--out", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "steps=3/naive/torch/fp32" in done.stdout
    written = record.read_record(tmp_path / "s.json").by_name()
    assert list(written) == [f"{a}/naive/torch/fp32" for a in ("steps=2", "steps=3")]
    ceilings = record.read_record(tmp_path / "s.json").ceilings
    assert ceilings["fp32"].tflops == 0.5
    more, fewer = (written[f"steps={k}/naive/torch/fp32"].flops["unet_decoder"] for k in (3, 2))
    assert more / fewer == pytest.approx(1.5)
    with Image.open(tmp_path / "s.png") as image:
        assert min(image.size) > 300


def test_a_sweep_of_all_variants_is_drawn_from_its_record(tmp_path):
    rows = [
        measured(
            f"steps={k}/{variant}/ort/fp32", [factor * k, factor * k + 1], [factor * k],
            stage=UNET, flops={UNET: factor * k}, peak_memory_bytes=10**9,
        )
        for k in (2, 4, 8)
        for variant, factor in (("naive", 10.0), ("hoisted", 9.0), ("merged", 7.0))
    ]  # fmt: skip
    rows.append(measured("batch=2/naive/ort/fp32", reason="its process was killed"))
    scaling.plot_scaling(made_record(*rows), tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as image:
        assert min(image.size) > 300


def test_the_share_of_the_peak_is_drawn_for_each_graph_where_the_peak_is_known(tmp_path):
    row = measured(
        "steps=4/hoisted/ort/fp32", [10.0, 11.0], [10.0],
        stage=UNET, flops={UNET: 1e9}, peak_memory_bytes=10**9,
    )  # fmt: skip
    parts = (UNET, "unet_encoder", "unet_decoder")
    taken = [replace(t, latency_ms=dict.fromkeys(parts, t.latency_ms[UNET])) for t in row.turns]
    row = replace(row, turns=tuple(taken), flops=dict.fromkeys(parts, 1e9))
    plain = made_record(row)
    peaked = replace(plain, ceilings={row.facts.precision: record.Ceiling(1.0, "hand")})
    assert summary.peak_share(row, peaked, "unet_decoder") == pytest.approx(0.1, rel=0.1)
    heights = []
    for number, one in enumerate((plain, peaked)):
        scaling.plot_scaling(one, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            heights.append(image.size[1])
    assert heights[1] > 1.2 * heights[0]


def test_bars_far_longer_than_the_others_are_cut(tmp_path):
    short = [summary.Spread(value, value, value, 1) for value in (1.0, 2.0, 3.0)]
    endless = summary.Spread(100.0, 99.0, 101.0, 1)
    assert plot._limit_ms([*short, endless]) == plot._limit_ms(short) == pytest.approx(4.05)
    rows = [measured(name, [value]) for name, value in (("a", 1.0), ("b", 1.1), ("c", 90.0))]
    plot.plot_record(made_record(*rows), "a", tmp_path / "p.svg")
    assert "bar cut" in (tmp_path / "p.svg").read_text("utf-8")


def test_an_empty_record_is_drawn_too(tmp_path):
    plot.plot_record(made_record(measured("a", reason="no")), None, tmp_path / "p.svg")
    assert "not measured: a" in (tmp_path / "p.svg").read_text("utf-8")


def test_stable_diffusion_cpp_reads_a_folder_that_transformers_5_wrote(tiny_pipeline):
    sd_cpp = module("latency.sd_cpp_session")
    own = safetensors.numpy.load_file(tiny_pipeline / "text_encoder" / "model.safetensors")
    assert not any(name.startswith("text_model.") for name in own)  # what it cannot read
    with sd_cpp.readable_checkpoint(str(tiny_pipeline)) as lent:
        renamed = safetensors.numpy.load_file(lent / "text_encoder" / "model.safetensors")
        assert {name.removeprefix("text_model.") for name in renamed} == set(own)
        assert all(name.startswith("text_model.") for name in renamed)
        assert (lent / "unet" / "config.json").is_file()
    assert not lent.exists()
    assert (tiny_pipeline / "unet" / "config.json").is_file()


def test_stable_diffusion_cpp_reads_a_folder_with_the_old_names_where_it_lies(
    tiny_pipeline, tmp_path
):
    sd_cpp = module("latency.sd_cpp_session")
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "old"))
    file = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({f"text_model.{n}": t for n, t in tensors.items()}, file)
    with sd_cpp.readable_checkpoint(str(folder)) as found:
        assert found == folder


def test_stable_diffusion_cpp_needs_a_whole_pipeline(tiny_pipeline):
    sd_cpp = module("latency.sd_cpp_session")
    with (
        pytest.raises(CheckpointError, match="needs a whole pipeline"),
        sd_cpp.readable_checkpoint(str(tiny_pipeline / "unet")),
    ):
        pass


@pytest.mark.skipif(
    importlib.util.find_spec("stable_diffusion_cpp") is None,
    reason="stable-diffusion-cpp-python is not installed",
)
def test_what_stable_diffusion_cpp_cannot_load_is_told_with_what_its_log_says(
    tiny_pipeline, tmp_path
):
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path / "cut"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RuntimeFailure, match=r"cannot load .*cut: .*unet") as caught:
        session.open_session("sd-cpp", {"checkpoint": str(folder)})
    assert "safetensors" in caught.value.message


def test_stage_times_are_read_from_the_log_of_stable_diffusion_cpp():
    sd_cpp = module("latency.sd_cpp_session")
    lines = [
        "[INFO ] stable-diffusion.cpp:2033 - get_learned_condition completed, taking 129 ms\n",
        "[INFO ] stable-diffusion.cpp:2141 - sampling completed, taking 9.55s\n",
        "[INFO ] stable-diffusion.cpp:2150 - generating 1 latent images completed, taking 9.56s\n",
        "[INFO ] stable-diffusion.cpp:2160 - decode_first_stage completed, taking 36.02s\n",
    ]
    assert sd_cpp.stage_times_ms(lines) == {
        "text_encoder": 129, UNET: pytest.approx(9550), "vae_decoder": pytest.approx(36020),
    }  # fmt: skip


# The machine


def test_the_environment_names_the_machine():
    here = environment.describe_environment()
    assert here.cores >= 1
    assert here.cpu
    assert here.packages["numpy"] == np.__version__
    assert here.program.startswith("tiue-export ")


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@settings(max_examples=1)
@given(st.just(50_000_000))
def test_memory_is_seen_to_grow_and_its_peak_begins_anew(size):
    before, _ = environment.process_memory_bytes()
    block = bytearray(os.urandom(1)) * size
    grown, peak = environment.process_memory_bytes()
    assert peak >= grown > before + size // 2
    del block
    if environment.forget_peak():
        assert environment.process_memory_bytes()[1] < peak


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_pages_of_a_mapped_file_are_told_apart(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20) * 32)
    before = environment.mapped_file_bytes(os.getpid())
    weights = np.memmap(file, np.uint8, "r")
    assert int(weights.max()) == 255  # reads every page
    assert environment.mapped_file_bytes(os.getpid()) >= before + (16 << 20)
    assert environment.mapped_file_bytes(2**30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_cpu_time_of_the_machine_never_runs_backwards():
    first = environment.busy_core_seconds()
    assert environment.busy_core_seconds() >= first > 0
