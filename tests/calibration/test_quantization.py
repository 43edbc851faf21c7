"""int8: planned from measurements, written as explicit Q/DQ, kept only where it is proven."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_options import ANY_SPEED, BY_RULE, PROMPTS, QUICK

from tiue_export.bundle.read import open_bundle
from tiue_export.calibration import (
    analysis,
    capture,
    int8_for_timing,
    placement,
    probe,
    simulate,
    verdict,
)
from tiue_export.calibration import quantize as quantizer
from tiue_export.calibration.onnx_layers import find_folds, find_layers
from tiue_export.calibration.plots import save_quantization_plots
from tiue_export.calibration.qdq_onnx import quantize_weight, scale_in, write_qdq
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import BundleError, ParityError, RegressionError, UsageError
from tiue_export.proof.calibration import CaptureOptions, open_calibration
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.proof.quantization import (
    BY_BLOCK,
    BY_LAYER,
    FASTER,
    SMALLER,
)
from tiue_export.proof.quantization_plan import (
    FLOAT,
    PLAN_FILE,
    W8A8,
    WEIGHTS,
    FoldPlan,
    LayerPlan,
    read_plan,
    student_identity,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, UNET_GRAPHS, RuntimeOptions
from tiue_export.system.openvino_core import native_precisions, openvino_core
from tiue_export.system.tensorrt_flavor import MODULES

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(MODULES["rtx"]) is None, reason="TensorRT-RTX is not installed"
)


@pytest.fixture(scope="module")
def data(tiny_bundle, tmp_path_factory):
    """Three captured runs. Shared."""
    root = tmp_path_factory.mktemp("data") / "data"
    return capture.capture(tiny_bundle, root, CaptureOptions(prompts=PROMPTS, count=3))


@pytest.fixture(scope="module")
def made(tiny_bundle, data, tmp_path_factory):
    """The tiny bundle in w8a8, every layer that no rule keeps out. Shared."""
    out = tmp_path_factory.mktemp("int8") / "tiny-int8"
    return quantizer.quantize(tiny_bundle, data, out, ANY_SPEED)


def nodes(bundle, graph: str):
    model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
    return list(model.graph.node), {t.name: t for t in model.graph.initializer}


# The graphs


def test_layers_are_found_with_what_reads_them_and_no_product_of_attention_is_among_them(
    tiny_bundle,
):
    for graph in UNET_GRAPHS:
        layers = find_layers(tiny_bundle.graph_path(graph), graph)
        every, stored = nodes(tiny_bundle, graph)
        assert {layer.op for layer in layers} == {"Conv", "MatMul"}
        assert all(layer.weight in stored and layer.flops > 0 for layer in layers)
        products = [n for n in every if n.op_type == "MatMul" and n.input[1] not in stored]
        assert products
        assert not {n.name for n in products} & {layer.name for layer in layers}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_folding_powers_of_two_changes_no_bit(tiny_bundle, half_bundle, tmp_path, precision):
    bundle = tiny_bundle if precision == "fp32" else half_bundle
    for graph in UNET_GRAPHS:
        path = bundle.graph_path(graph)
        layers = find_layers(path, graph)
        folds = find_folds(path, layers)
        endings = {name.rsplit(".", 1)[-1] for fold in folds for name in fold.layers}
        assert {"to_q/MatMul", "2/MatMul"} <= endings  # behind a norm, and behind a gated unit
        random = np.random.RandomState(0)
        plans = [
            (fold, FoldPlan(graph, fold.layers[0], " ".join(map(str, random.randint(-3, 4, size)))))
            for fold in folds
            if (size := fold.producers[0].length)
        ]
        changed = write_qdq(path, tmp_path / graph, layers, {}, plans)
        feeds = {
            t.name: random.standard_normal(tuple(map(int, t.shape))).astype(t.dtype)
            for t in bundle.spec(graph).inputs
        }
        before, after = (
            onnxruntime.InferenceSession(str(file)).run(None, feeds) for file in (path, changed)
        )
        tolerance = 0 if precision == "fp32" else 2e-2  # half kernels may round elsewhere
        for mine, theirs in zip(before, after, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def test_planned_layers_alone_have_pairs_symmetric_and_per_channel(made):
    for graph in UNET_GRAPHS:
        every, stored = nodes(made.bundle, graph)
        by_output = {name: node for node in every for name in node.output}
        planned = made.plan.of(graph)
        assert planned
        for node in every:
            if node.op_type not in ("Conv", "MatMul"):
                continue
            makers = [by_output.get(name) for name in node.input[:2]]
            kinds = [maker.op_type if maker is not None else "" for maker in makers]
            if node.name not in planned:
                assert "DequantizeLinear" not in kinds
                continue
            assert kinds == ["DequantizeLinear"] * 2
            weight, scale = (stored[name] for name in makers[1].input)
            axis = next(a.i for a in makers[1].attribute if a.name == "axis")
            assert weight.data_type == onnx.TensorProto.INT8
            assert tuple(scale.dims) == (weight.dims[axis],)
            assert makers[0].input[2] == "int8.zero"


def test_a_tensor_that_several_layers_read_is_quantized_once(made):
    every, _ = nodes(made.bundle, UNET_ENCODER)
    pairs = [node.input[0] for node in every if node.op_type == "QuantizeLinear"]
    assert len(pairs) == len(set(pairs)) < len(made.plan.of(UNET_ENCODER))


def test_the_written_graphs_compute_what_was_simulated(tiny_bundle, data, made):
    analyser = analysis.Analyser(tiny_bundle, data, BY_RULE)
    analyser._find_ranges()
    judge = probe.Probe(tiny_bundle, data, [2])
    planned = made.plan.of(UNET_DECODER)
    changes = [
        analyser.simulated(layer)
        for layer in analyser.layers[UNET_DECODER]
        if layer.name in planned
    ]
    model = simulate.simulated_model(tiny_bundle.graph_path(UNET_DECODER), changes)
    simulated = judge.of_model(UNET_DECODER, model)
    written = judge.of_files({UNET_DECODER: made.bundle.graph_path(UNET_DECODER)})
    assert written == pytest.approx(simulated, abs=1.0)


def test_a_half_bundle_replays_the_plan_with_scales_of_either_width(
    half_bundle, made, data, tmp_path
):
    plan = made.bundle.root / PLAN_FILE
    sizes = {}
    for scales, kind in (("auto", onnx.TensorProto.FLOAT16), ("fp32", onnx.TensorProto.FLOAT)):
        options = replace(ANY_SPEED, plan=plan, scales=scales)
        half = quantizer.quantize(half_bundle, data, tmp_path / scales, options)
        every, stored = nodes(half.bundle, UNET_ENCODER)
        found = {stored[node.input[1]].data_type for node in every if "Quant" in node.op_type}
        assert found == {kind}
        sizes[scales] = sum(node.op_type == "Cast" for node in every)
        assert half.verdict.latents_psnr_db > 40
        assert half.bundle.manifest.precision == "fp16"
    assert sizes["fp32"] > sizes["auto"]


@needs_rtx
def test_tensorrt_rtx_builds_it_and_counts_products_in_int8(half_bundle, made, data, tmp_path, run):
    options = replace(ANY_SPEED, plan=made.bundle.root / PLAN_FILE)
    bundle = quantizer.quantize(half_bundle, data, tmp_path / "int8", options).bundle
    # The builder's time goes into the graphs that are not quantized, too.
    keep = {UNET_ENCODER: bundle.manifest.graphs[UNET_ENCODER]}
    small = replace(bundle.manifest, graphs=keep)
    (bundle.root / "tiue.json").write_text(small.to_json())
    code, out, err = run(
        "trt", "--bundle", bundle.root, "--flavor", "rtx", "--precision", "int8", "--json"
    )
    assert code == 0, err
    report = json.loads(out)["compiled"]["trt-rtx"]["graphs"][UNET_ENCODER]["report"]
    assert report["products_int8"] == len(made.plan.of(UNET_ENCODER))
    assert "products_float" not in report
    code, _, err = run("trt", "--bundle", bundle.root, "--flavor", "rtx", "--precision", "fp16")
    assert (code, "--precision is fp16, but the graphs of" in err) == (2, True)


@needs_rtx
def test_tensorrt_in_int8_from_float_says_what_to_do_first(tiny_bundle, run):
    place = tiny_bundle.root
    code, _, err = run("trt", "--bundle", place, "--flavor", "rtx", "--precision", "int8")
    assert code == UsageError.exit_code
    assert "are fp32: int8 needs measured ranges" in err
    assert f"tiue-export calibrate {place}" in err
    code, _, err = run("trt", "--ckpt", "x.safetensors", "--precision", "int8")
    assert (code, "--precision int8 takes a quantized bundle" in err) == (2, True)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6),
    st.sampled_from([np.float32, np.float16]),
)
def test_a_weight_is_off_by_half_a_step_at_most_and_never_clipped(values, dtype):
    weight = np.array(values, np.float32).reshape(2, 3)
    found = quantize_weight(weight, 0, dtype)
    step = found.scales.astype(np.float32).reshape(-1, 1)
    assert (
        np.abs(found.dequantized() - weight).max(axis=1).tolist()
        <= (step.ravel() * 0.5 + 1e-6).tolist()
    )
    assert np.abs(found.values).max() <= 127


@given(st.floats(0, 100))
def test_a_scale_in_half_is_never_smaller_than_asked_for_and_never_0(value):
    assert float(scale_in(np.array(value), np.float16)) >= max(value, 1e-6)


# The plan


def test_a_plan_says_of_every_layer_what_it_becomes_and_why(made, tiny_bundle):
    plan = made.plan
    assert {layer.mode for layer in plan.layers} == {W8A8, FLOAT}
    kept = {layer.name: layer.why for layer in plan.layers if layer.mode == FLOAT}
    assert kept["conv_in/Conv"].startswith("rule: ")
    assert all(any(w in n for w in ("conv_in", "conv_out", "conv_shortcut")) for n in kept)
    assert plan.student == student_identity(tiny_bundle.manifest)
    assert 0.7 < plan.int8_share < 1
    text = (made.bundle.root / PLAN_FILE).read_text()
    assert read_plan(made.bundle.root / PLAN_FILE) == plan
    # One layer a line, for people.
    assert sum("conv_in/Conv" in line for line in text.splitlines()) == 1


def test_an_edited_plan_is_replayed(made, tiny_bundle, data, tmp_path):
    text = (made.bundle.root / PLAN_FILE).read_text().splitlines()
    edited = [
        line.replace('"mode": "w8a8"', '"mode": "float"') if "attentions" in line else line
        for line in text
    ]
    (tmp_path / "plan.json").write_text("\n".join(edited))
    options = replace(ANY_SPEED, plan=tmp_path / "plan.json")
    other = quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    assert other.plan.int8_share < made.plan.int8_share
    assert other.verdict.latents_psnr_db > made.verdict.latents_psnr_db
    every, _ = nodes(other.bundle, UNET_ENCODER)
    quantized = [node.name for node in every if "Quantize" in node.op_type]
    assert not any("attentions" in name for name in quantized)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"mode": "w8a8"',
            '"mode": "int4"',
            "unknown mode of .* 'int4'",
        ),
        ('"activation_scale": 0.', '"activation_scale": -0.', "expected a number above 0"),
        ('"exponents": "', '"exponents": "99 ', "are not integers between -15 and 15"),
        ('"format_version": 1', '"format_version": 8', "is a plan of format version 8"),
        ('"graph": "unet_encoder"', '"graph": 7', "graph is '7'; expected str"),
        ("{", "", "cannot be read as a plan"),
    ],
)
def test_a_plan_that_was_edited_wrongly_is_explained(made, tmp_path, before, after, message):
    path = tmp_path / "plan.json"
    path.write_text((made.bundle.root / PLAN_FILE).read_text().replace(before, after))
    with pytest.raises(UsageError, match=message):
        read_plan(path)


def test_a_plan_of_another_student_or_for_other_layers_is_refused(
    made, tiny_bundle, data, tmp_path
):
    path = tmp_path / "plan.json"
    path.write_text(replace(made.plan, student="0" * 64).to_json())
    options = replace(ANY_SPEED, plan=path)
    with pytest.raises(UsageError, match="the plan was made for another student"):
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    stranger = LayerPlan(UNET_ENCODER, "nowhere/Conv", "Conv", W8A8, "", 1, "x", 0.1)
    path.write_text(replace(made.plan, layers=(*made.plan.layers, stranger)).to_json())
    with pytest.raises(UsageError, match="the plan names nowhere/Conv, which unet_encoder does"):
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    nothing = tuple(replace(layer, mode=FLOAT) for layer in made.plan.layers)
    path.write_text(replace(made.plan, layers=nothing).to_json())
    with pytest.raises(UsageError, match="the plan quantizes no layer"):
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_hybrid_keeps_the_inputs_of_linear_layers_in_float(tiny_bundle, data, tmp_path):
    options = replace(ANY_SPEED, kind="hybrid")
    hybrid = quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    modes = {(layer.op, layer.mode) for layer in hybrid.plan.layers}
    assert modes == {("Conv", W8A8), ("Conv", FLOAT), ("MatMul", WEIGHTS)}
    assert hybrid.bundle.manifest.graphs[UNET_DECODER].precision == W8A8
    assert not hybrid.plan.folds


def test_weights_alone_need_no_range_quarter_the_size_and_pass_their_own_gate(
    tiny_bundle, data, tmp_path
):
    options = replace(ANY_SPEED, kind=WEIGHTS, any_speed=False)
    light = quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    assert light.verdict.gate_psnr_db == 45
    assert light.verdict.must_be == SMALLER
    assert light.plan.ranges == "none"
    record = light.bundle.manifest.graphs[UNET_DECODER]
    (size,) = (f.size_bytes for name, f in record.files.items() if name.endswith(".data"))
    before = tiny_bundle.manifest.graphs[UNET_DECODER].files["unet_decoder/model.onnx.data"]
    assert size < 0.4 * before.size_bytes


# Sensitivity


def unit(name: str, flops: int, psnr: float):
    layer = find_layer(name, flops)
    return placement.Unit((layer,), psnr, name)


def find_layer(name: str, flops: int):
    from tiue_export.calibration.onnx_layers import Layer

    return Layer(UNET_ENCODER, name, "Conv", f"{name}.x", f"{name}.w", (8, 8), (1, 8), flops)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(20, 90)), min_size=1, max_size=12),
    st.floats(20, 90),
)
def test_the_chosen_set_meets_the_target_and_one_unit_more_would_not(pairs, target):
    units = [unit(f"u{i}/Conv", flops, psnr) for i, (flops, psnr) in enumerate(pairs)]

    def measure(chosen):
        return -10 * np.log10(sum(u.noise for u in chosen))

    found = placement.select(units, target, 1000, measure)
    order, count = found.order, found.count
    assert count == 0 or measure(order[:count]) >= target
    assert count == len(order) or measure(order[: count + 1]) < target
    assert len(found.points) <= 1 + np.ceil(np.log2(len(order) + 1)) + 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(20, 90)), min_size=1, max_size=12),
    st.floats(20, 90),
    st.integers(1, 6),
)
def test_sets_for_the_curve_are_spread_and_change_no_choice(pairs, target, sets):
    units = [unit(f"u{i}/Conv", flops, psnr) for i, (flops, psnr) in enumerate(pairs)]

    def measure(chosen):
        return -10 * np.log10(sum(u.noise for u in chosen))

    plain = placement.select(units, target, 1000, measure)
    curve = placement.select(units, target, 1000, measure, sets)
    assert curve.chosen == plain.chosen
    assert curve.points[: len(plain.points)] == plain.points
    counts = [point.units for point in curve.points]
    assert len(counts) == len(set(counts))
    # Nowhere is the gap wider than one part of the operations and the unit that crosses its border.
    shares = sorted([0.0, *(point.int8_share for point in curve.points)])
    total, widest = sum(f for f, _ in pairs) / 1000, max(f for f, _ in pairs) / 1000
    gaps = [b - a for a, b in itertools.pairwise(shares)]
    assert max(gaps) <= total / (sets + 1) + widest + 1e-9


def test_blocks_hold_what_belongs_together():
    names = (
        "down_blocks.0.resnets.0.conv1/Conv",
        "down_blocks.0.resnets.0.conv2/Conv",
        "down_blocks.0.attentions.0.proj_in/MatMul",
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2/MatMul",
        "other/Conv",
    )
    layers = [find_layer(name, 1) for name in names]
    blocks = placement.units_of(layers, BY_BLOCK)
    assert [len(group) for group in blocks.values()] == [2, 2, 1]
    assert len(placement.units_of(layers, BY_LAYER)) == 5


@pytest.fixture(scope="module")
def analysed(tiny_bundle, data):
    """A plan by blocks with a target that not all layers meet. Shared."""
    options = replace(
        BY_RULE, sensitivity="block", smoothing_alpha=None, target_psnr_db=57.0, threads=1
    )
    return options, analysis.Analyser(tiny_bundle, data, options).run()


def test_a_target_decides_which_blocks_are_quantized_and_the_plan_says_so(analysed):
    _, found = analysed
    plan, points = found.plan, found.selection.points
    assert points[0].units == len(found.selection.order)
    assert points[0].psnr_db < 57
    assert found.selection.psnr_db >= 57
    assert 0 < plan.int8_share < points[0].int8_share
    whys = {layer.why for layer in plan.layers if layer.psnr_db is not None}
    assert whys == {"chosen: the set meets 57 dB", "left out: with it the set misses 57 dB"}


def test_what_was_measured_is_not_measured_again(analysed, tiny_bundle, data, monkeypatch):
    options, found = analysed

    def never(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(probe.Probe, "of_model", never)
    monkeypatch.setattr(analysis, "observe", never)
    again = analysis.Analyser(tiny_bundle, data, replace(options, target_psnr_db=20.0)).run()
    assert again.plan.int8_share == found.selection.points[0].int8_share
    journal = next((data.root / "analysis").glob("sensitivity-*.jsonl"))
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines, lines[-1][:9]]))  # a kill cut the last line off
    assert analysis.Analyser(tiny_bundle, data, options).run().plan == found.plan


def test_a_line_that_a_kill_cut_off_costs_one_measurement_and_swallows_none(
    analysed, tiny_bundle, data, monkeypatch
):
    options, found = analysed
    journal = next((data.root / "analysis").glob("sensitivity-*.jsonl"))
    lines = [line for line in journal.read_text().splitlines() if line.endswith("}")]
    # Two units were not measured yet, and the line of the first of them was cut off.
    journal.write_text("\n".join([*lines[:-2], lines[-2][:9]]))
    measured, real = [], probe.Probe.of_model
    monkeypatch.setattr(
        probe.Probe, "of_model", lambda *args: (measured.append(args[1]), real(*args))[1]
    )
    assert analysis.Analyser(tiny_bundle, data, options).run().plan == found.plan
    assert len(measured) == 2
    assert analysis.Analyser(tiny_bundle, data, options).run().plan == found.plan
    assert len(measured) == 2


def test_pictures_show_the_losses_and_the_curve(analysed, tmp_path):
    _, found = analysed
    saved = save_quantization_plots(found.plan, found.selection.points, tmp_path / "p")
    sizes = [path.stat().st_size for path in saved]
    assert [path.name for path in saved] == ["sensitivity.png", "int8-share.png"]
    assert min(sizes) > 5_000


# The verdict


def test_the_result_opens_draws_and_carries_its_plan_and_verdict(made, tiny_bundle):
    bundle = open_bundle(made.bundle.root)
    assert {bundle.manifest.graphs[g].precision for g in UNET_GRAPHS} == {W8A8}
    assert bundle.manifest.graphs["text_encoder"].precision == "fp32"
    (record,) = bundle.manifest.parity
    assert (record.gate, record.passed, record.value > 40) == (30, True, True)
    told = json.loads((bundle.root / "quantization" / "verdict.json").read_text())
    assert told["latents_psnr_db"] == made.verdict.latents_psnr_db == record.value
    assert told["size_bytes"]["quantized"] < 0.5 * told["size_bytes"]["float"]
    with Pipeline.open(tiny_bundle) as before, Pipeline.open(bundle) as after:
        mine, theirs = (p("a red fox", seed=3).pictures[0].latents for p in (before, after))
    assert psnr_db(mine, theirs) > 35


def test_the_parity_command_judges_each_graph_at_its_own_gate(made):
    runtime = open_runtime("ort", made.bundle, RuntimeOptions(device="cpu"))
    records = measure_runtime(made.bundle, runtime, load_reference(made.bundle))
    runtime.close()
    assert {record.subject: record.gate for record in records} == {
        "encoder_hidden_states": 100,
        "latents": 30,
        "picture": 100,
    }
    assert all(record.passed for record in records)


def test_below_the_gate_it_is_refused_with_the_layers_to_blame_unless_allowed(
    analysed, tiny_bundle, data, tmp_path
):
    _, found = analysed
    plan = tmp_path / "plan.json"
    plan.write_text(found.plan.to_json())
    strict = replace(
        ANY_SPEED, plan=plan, judged=replace(QUICK, gate_psnr_db=200.0), any_speed=True
    )
    with pytest.raises(ParityError, match=r"gate 200 dB; what costs most: unet_\w+/.* dB alone"):
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", strict)
    assert not (tmp_path / "out").exists()
    lax = replace(strict, allow_loss=True)
    kept = quantizer.quantize(tiny_bundle, data, tmp_path / "out", lax)
    assert kept.bundle.manifest.parity_loss_allowed
    assert not kept.verdict.accurate


def test_slower_or_larger_is_refused_unless_allowed(made):
    slow = replace(made.verdict, must_be=FASTER, speed_ratio=0.8)
    with pytest.raises(RegressionError, match=r"not faster on ort cpu: unet_encoder \d") as caught:
        verdict.require_worth(slow, allow_loss=False, allow_slower=False)
    assert "--any-speed" in caught.value.next_step
    verdict.require_worth(slow, allow_loss=False, allow_slower=True)
    large = replace(made.verdict, must_be=SMALLER, size_bytes={"float": 1, "quantized": 2})
    with pytest.raises(RegressionError, match="are not smaller"):
        verdict.require_worth(large, allow_loss=False, allow_slower=False)
    verdict.require_worth(replace(slow, must_be=None), allow_loss=False, allow_slower=False)


@pytest.mark.parametrize("low_memory", [False, True])
def test_loading_a_graph_is_never_timed(made, tiny_bundle, data, monkeypatch, low_memory):
    """With --low-memory some runtimes load a graph for each run: timed, that hides what int8 is."""
    held, events = [], []

    class Slow:
        def __init__(self, runtime, options):
            self.runtime, self.keeps, self.loaded = runtime, not options.low_memory, set()

        def run(self, graph, feeds):
            if graph not in self.loaded:
                events.append("load")
            self.loaded |= {graph} if self.keeps else set()
            return self.runtime.run(graph, feeds)

        def close(self):
            held.remove(self)
            self.runtime.close()

        def __getattr__(self, name):
            return getattr(self.runtime, name)

    def opened(name, bundle, options):
        runtime = Slow(open_runtime(name, bundle, options), options)
        held.append(runtime)
        events.append(len(held))
        return runtime

    clock = iter(range(1000))

    def ticked():
        events.append("clock")
        return next(clock)

    monkeypatch.setattr(verdict, "open_runtime", opened)
    monkeypatch.setattr(verdict.time, "perf_counter", ticked)
    options = replace(QUICK, rounds=2, low_memory=low_memory)
    judged = verdict.judge(tiny_bundle, made.bundle, made.plan, data, [2], options)
    timed = [i for i, event in enumerate(events) if event == "clock"]
    assert len(timed) == 2 * 2 * 2 * 2  # start and end, graphs, contenders, rounds
    assert all(end == start + 1 for start, end in zip(timed[::2], timed[1::2], strict=True))
    assert "load" in events
    together = max(event for event in events if isinstance(event, int))
    assert together == (1 if low_memory else 2)
    alone = "each loaded for its turn alone"
    assert judged.loading == (alone if low_memory else "loaded together, in turn")
    assert not held


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "int4"}, "unknown kind 'int4'; there are: 4-bit, hybrid, int8-weights, w8a8"),
        ({"backend": "tvm"}, "unknown backend 'tvm'; there are: onnx, openvino"),
        ({"kind": "4-bit"}, "4-bit weights need a newer opset"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(
    tiny_bundle, data, tmp_path, changes, message
):
    with pytest.raises(UsageError, match=message):
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", replace(ANY_SPEED, **changes))


@pytest.mark.parametrize("option", [("--backend", "tvm"), ("--kind", "int9")])
def test_a_word_that_is_none_is_refused_before_the_captured_data_are_read(
    run, tiny_bundle, tmp_path, option
):
    code, _, err = run("quantize", tiny_bundle.root, "--calibration", tmp_path / "none", *option)
    assert (code, f"unknown {option[0][2:]} {option[1]!r}" in err) == (2, True)


@pytest.mark.parametrize(
    "option",
    [
        ("--kind", "hybrid"),
        ("--target-psnr", "40"),
        ("--ranges", "entropy"),
        ("--percentile", "99"),
        ("--smooth", "0.7"),
        ("--no-smooth",),
        ("--sensitivity", "block"),
    ],
)
def test_what_a_plan_decides_cannot_be_asked_for_beside_it(run, made, tiny_bundle, data, option):
    plan = made.bundle.root / PLAN_FILE
    code, _, err = run(
        "quantize", tiny_bundle.root, "--calibration", data.root, "--plan", plan, *option
    )
    assert code == UsageError.exit_code
    assert f"{option[0]} has no say beside --plan: {plan} decides for every layer" in err
    assert f"Leave {option[0]} out, edit the plan, or leave --plan out" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--sensitivity", "none"), "--plots needs a sensitivity, which this plan does not have"),
        (("--kind", "int8-weights"), "--kind int8-weights measures none"),
    ],
)
def test_pictures_of_what_is_not_measured_are_refused_before_any_work(
    run, tiny_bundle, data, tmp_path, option, message
):
    out = tmp_path / "out"
    options = ("--calibration", data.root, "--plots", tmp_path / "plots", "--out", out, *option)
    code, _, err = run("quantize", tiny_bundle.root, *options)
    assert code == UsageError.exit_code
    assert message in err
    assert not out.exists()


def test_too_few_runs_to_hold_some_out_are_refused(tiny_bundle, data):
    with pytest.raises(UsageError, match=r"has 3 drawing\(s\); expected more than the 4 held out"):
        analysis.Analyser(tiny_bundle, data, replace(BY_RULE, held_out=4))


# OpenVINO


def test_the_openvino_backend_needs_float_graphs_to_start_from(tiny_bundle, data, tmp_path):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    options = replace(ANY_SPEED, backend="openvino", judged=replace(QUICK, runtime="openvino"))
    with pytest.raises(BundleError, match="has no OpenVINO graphs to quantize") as caught:
        quantizer.quantize(tiny_bundle, data, tmp_path / "out", options)
    assert caught.value.next_step.startswith("Make them first: tiue-export openvino --bundle")


@pytest.mark.parametrize("kind", ["hybrid", "4-bit"])
def test_nncf_quantizes_what_the_plan_names_and_nothing_else(
    compiled_bundle, data, made, tmp_path, monkeypatch, kind
):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    judged = replace(QUICK, runtime="openvino", precision="fp32")
    options = replace(
        ANY_SPEED, kind=kind, backend="openvino", judged=judged, allow_loss=kind == "4-bit"
    )
    result = quantizer.quantize(compiled_bundle, data, tmp_path / "out", options)
    bundle = open_bundle(result.bundle.root)
    assert all(record.omitted for record in bundle.manifest.graphs.values())
    assert bundle.size_bytes < 0.8 * compiled_bundle.size_bytes
    wanted = {name for name, layer in result.plan.of(UNET_DECODER).items() if layer.mode == W8A8}
    assert _with_fake_inputs(bundle, UNET_DECODER) == wanted
    if kind != "4-bit":
        assert result.verdict.latents_psnr_db > 40
    with Pipeline.open(bundle, "openvino", RuntimeOptions(precision="fp32")) as pipeline:
        assert pipeline("a red fox").images[0].size == (64, 64)


def test_a_bundle_for_timing_has_every_layer_in_int8_that_no_rule_keeps_out(
    compiled_bundle, made, tmp_path, monkeypatch
):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = int8_for_timing.write_for_timing(compiled_bundle, tmp_path / "timed")
    for graph in UNET_GRAPHS:
        assert bundle.manifest.graphs[graph].precision == W8A8
        assert _with_fake_inputs(bundle, graph) == set(made.plan.of(graph))
    with Pipeline.open(bundle, "openvino", RuntimeOptions(precision="fp32")) as pipeline:
        assert pipeline("a red fox").images[0].size == (64, 64)


def _with_fake_inputs(bundle, graph: str) -> set[str]:
    """Layers whose input comes out of a fake quantization, by their ONNX names."""
    form = bundle.manifest.compiled["openvino"].graphs[graph]
    model = openvino_core().read_model(bundle.root / form.path)
    found = set()
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "MatMul"):
            source = op.input_value(0).get_node()
            if source.get_type_name() == "FakeQuantize":
                found.add(op.get_friendly_name().removesuffix("/WithoutBiases"))
    return found


def _lacks_vnni() -> bool:
    """Without it OpenVINO adds pairs of int8 products in 16 bits, which saturate."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and not {"avx512_vnni", "avx_vnni"} & set(info.read_text().split())


@pytest.mark.slow
@pytest.mark.skipif(
    _lacks_vnni(), reason="this CPU has no VNNI: OpenVINO's int8 sums saturate (docs/int8.md)"
)
def test_openvino_reads_the_same_pairs(compiled_bundle, data, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    judged = replace(QUICK, runtime="openvino", precision="fp32")
    options = replace(ANY_SPEED, plan=made.bundle.root / PLAN_FILE, judged=judged)
    result = quantizer.quantize(compiled_bundle, data, tmp_path / "out", options)
    assert set(result.bundle.manifest.compiled) == {"openvino"}
    assert result.verdict.runtime == "openvino cpu fp32"
    assert result.verdict.latents_psnr_db == pytest.approx(made.verdict.latents_psnr_db, abs=3)


def test_float_contenders_are_called_by_the_precision_they_run_in(
    compiled_bundle, data, made, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    judged = replace(QUICK, runtime="openvino")
    options = replace(ANY_SPEED, plan=made.bundle.root / PLAN_FILE, judged=judged, allow_loss=True)
    verdict = quantizer.quantize(compiled_bundle, data, tmp_path / "out", options).verdict
    floats = [f"float {precision}" for precision in native_precisions()]
    assert list(verdict.latency_ms) == [*floats, "quantized"]


# The command


def test_the_command_makes_a_bundle_and_prints_the_verdict(run, tiny_bundle, data, tmp_path):
    line = ("quantize", tiny_bundle.root, "--calibration", data.root, "--out", "int8")
    quick = ("--sensitivity", "none", "--held-out", 1, "--ranges", "min-max", "--rounds", 1)
    code, out, err = run(*line, *quick, "--any-speed", "--save-plan", "plan.json")
    assert code == 0, err
    assert "w8a8: kind: every layer that no rule keeps out" in out
    assert "next:  tiue-export generate int8" in out
    assert read_plan(tmp_path / "plan.json").int8_share > 0.7
    code, _, err = run(*line, *quick, "--any-speed")
    assert (code, "already holds a bundle" in err) == (BundleError.exit_code, True)
    again = ("--plan", "plan.json", "--any-speed", "--force", "--json", "--held-out", 1)
    code, out, _ = run(*line, *again, "--rounds", 1)
    facts = json.loads(out)
    assert code == 0
    assert facts["verdict"]["accurate"] is True
    assert facts["layers"]["w8a8"] > 100


def test_a_plan_can_be_made_without_a_bundle(run, tiny_bundle, data, tmp_path):
    code, out, err = run(
        "quantize", tiny_bundle.root, "--calibration", data.root, "--plan-only", "--json",
        "--sensitivity", "none", "--held-out", 1, "--ranges", "min-max",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["bundle"] is None
    assert len(json.loads(out)["plan"]["layers"]) > 100
    assert list(tmp_path.glob("*-w8a8")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--percentile", 99, "--ranges", "entropy"],
            "--percentile belongs to --ranges percentile",
        ),
        (["--smooth", 0.5, "--no-smooth"], "--smooth and --no-smooth contradict each other"),
        (["--smooth", 1.5], "--smooth is 1.5; expected a number between 0 and 1"),
        (["--sensitivity", "row"], "unknown sensitivity 'row'; there are: block, layer, none"),
        (
            ["--held-out", 1, "--plots", "p", "--plan-only", "--sensitivity", "none"],
            "--plots needs",
        ),
        (["--calibration", "."], "holds no calibration data: it has no calibration.json"),
    ],
)
def test_options_that_make_no_sense_are_refused(run, tiny_bundle, data, arguments, message):
    code, _, err = run(
        "quantize", tiny_bundle.root, "--calibration", data.root, "--ranges", "min-max", *arguments
    )
    assert code == UsageError.exit_code
    assert message in err


def test_a_copy_of_the_data_on_another_disk_still_fits(data, tiny_bundle, tmp_path):
    copied = Path(shutil.copytree(data.root, tmp_path / "copy"))
    assert open_calibration(copied, tiny_bundle).sha256 == data.sha256
