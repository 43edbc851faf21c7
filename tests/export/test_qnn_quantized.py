"""Snapdragon in 8 bits: quantized by ONNX Runtime, compiled and emulated by Qualcomm, for real."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from tiue_export import export_onnx, load_student, open_bundle
from tiue_export.bundle.read import Bundle
from tiue_export.errors import UsageError
from tiue_export.export.qnn import quantize_process
from tiue_export.export.qnn.bundle import QnnBackend, compile_qnn
from tiue_export.export.qnn.calibration_feeds import feeds_files, record_feeds
from tiue_export.export.qnn.options import NOTHING, QnnOptions
from tiue_export.export.qnn.quantize_process import QuantizeRequest, half_nodes, quantize_graph
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.conditioning import SUBJECT
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import UNET
from tiue_export.proof.quantization_plan import (
    FLOAT,
    PLAN_VERSION,
    WEIGHTS,
    LayerPlan,
    QuantizationPlan,
    student_identity,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER, RuntimeOptions
from tiue_export.system.progress import Observer

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
PROMPTS = ("a red fox in the snow", "two owls", "a boat", "a lighthouse at night")


@pytest.fixture(scope="module")
def student_bundle(micro_pipeline, made_once) -> Bundle:
    """A student of all parts in one pass, in float32. Shared."""
    return open_bundle(
        made_once("snapdragon-fp32", lambda at: export_onnx(load_student(micro_pipeline), at))
    )


@pytest.fixture(scope="module")
def w8a16_bundle(student_bundle, made_once) -> Bundle:
    """The same with contexts in w8a16. Shared."""

    def make(folder: Path) -> None:
        shutil.copytree(student_bundle.root, folder, dirs_exist_ok=True)
        options = QnnOptions(precision="w8a16", prompts=PROMPTS)
        # Random weights hear little of a prompt: 12.6 dB of its effect are above the error.
        compile_qnn(open_bundle(folder), options, allow_parity_loss=True)

    return open_bundle(made_once("snapdragon-w8a16", make))


@pytest.fixture(scope="module")
def feeds(student_bundle, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("feeds")
    record_feeds(student_bundle, PROMPTS, folder)
    return folder


def plan_for(bundle: Bundle, **modes: str) -> QuantizationPlan:
    """A plan of the named layers of the decoder."""
    layers = tuple(
        LayerPlan(UNET_DECODER, name, "Conv", mode, "chosen by hand", 1, "x")
        for name, mode in modes.items()
    )
    return QuantizationPlan(
        PLAN_VERSION, "test", student_identity(bundle.manifest), "", "", 1, 35.0, 1, layers
    )


def quantized(bundle: Bundle, graph: str, feeds: Path, target: Path, **changes: object) -> Path:
    """The graph as the child process leaves it, made in this process."""
    request = QuantizeRequest(
        onnx=str(bundle.graph_path(graph)),
        quantized=str(target / f"{graph}.onnx"),
        feeds=feeds_files(feeds, graph),
        precision="w8a16",
    )
    quantize_graph(replace(request, **changes))
    return target / f"{graph}.onnx"


def simulated_db(bundle: Bundle, graph: str, feeds: Path, path: Path) -> float:
    """The worst output of a quantized graph in ONNX Runtime's own arithmetic, in dB."""
    arrays = load_file(feeds_files(feeds, graph)[0])
    exact, rounded = (
        onnxruntime.InferenceSession(str(file)).run(None, arrays)
        for file in (bundle.graph_path(graph), path)
    )
    return min(psnr_db(a, b) for a, b in zip(exact, rounded, strict=True))


# What is made


def test_every_graph_is_quantized_and_proven_by_the_emulator(w8a16_bundle):
    form = w8a16_bundle.manifest.compiled["qnn-v75"]
    assert form.flags["precision"] == "w8a16"
    assert form.flags["calibration_prompts"] == len(PROMPTS)
    for graph in form.graphs.values():
        assert graph.report["quantize_s"] > 0
        assert graph.report["layers"] > 0
        assert graph.report["layers_in_half"] == 0
    subjects = {record.subject: record for record in form.parity}
    assert set(subjects) == {"encoder_hidden_states", "latents", "picture", SUBJECT}
    for subject, record in subjects.items():
        assert record.passed == (subject != SUBJECT)
        assert record.value < 80, "eight bits of weights"
    assert {record.gate for record in form.parity} == {35.0, 20.0}
    assert not list(w8a16_bundle.root.glob("qnn-v75/.*")), "no feeds are left"


def test_every_layers_weights_are_int8_with_a_scale_for_each_channel(
    student_bundle, feeds, tmp_path
):
    model = onnx.load(quantized(student_bundle, UNET_ENCODER, feeds, tmp_path))
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    layers = 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        values, scales, *_ = makers[node.input[1]].input
        if values in arrays:  # else the product of two activations
            layers += 1
            assert arrays[values].dtype == np.int8
            assert arrays[scales].size == output_channels(node, arrays[values])
    assert layers > 10


def output_channels(node: onnx.NodeProto, weight: np.ndarray) -> int:
    """How many outputs a layer of these weights has."""
    transposed = any(each.name == "transB" and each.i for each in node.attribute)
    return weight.shape[0 if node.op_type == "Conv" or transposed else -1]


def test_what_is_not_proven_is_said_and_recorded_as_such(student_bundle, tmp_path):
    notes: list[str] = []
    bundle = open_bundle(shutil.copytree(student_bundle.root, tmp_path / "b"))
    made = compile_qnn(bundle, QnnOptions(prove=NOTHING), observer=Observer(on_note=notes.append))
    assert made.manifest.compiled["qnn-v75"].parity == ()
    assert notes == [
        "no context was run: prove them with tiue-export parity "
        f"{made.root} --runtime qnn --device v75"
    ]


def test_the_runtime_says_in_which_numbers_it_computes(w8a16_bundle):
    runtime = open_runtime("qnn", w8a16_bundle, RuntimeOptions(device="emulator"))
    assert runtime.precision == "htp-w8a16"
    runtime.close()


def test_rows_one_at_a_time_are_quantized_too_and_one_run_of_the_unet_proves_them(
    micro_pipeline, tmp_path
):
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=1))
    bundle = export_onnx(student, tmp_path / "b")
    options = QnnOptions(precision="w8a16", prompts=PROMPTS, prove=UNET)
    form = compile_qnn(bundle, options).manifest.compiled["qnn-v75"]
    assert [record.subject for record in form.parity] == ["prompt_embeds", "outputs"]
    assert all(record.passed for record in form.parity)


def test_layers_that_a_plan_keeps_in_float_stay_in_half(student_bundle, tmp_path):
    root = shutil.copytree(student_bundle.root, tmp_path / "b")
    model = onnx.load(student_bundle.graph_path(UNET_DECODER), load_external_data=False)
    first, second, *_ = [node.name for node in model.graph.node if node.op_type == "Conv"]
    options = QnnOptions(
        precision="w8a8",
        prompts=PROMPTS,
        plan=plan_for(student_bundle, **{first: FLOAT, second: WEIGHTS}),
        prove=NOTHING,
    )
    graphs = compile_qnn(open_bundle(root), options).manifest.compiled["qnn-v75"].graphs
    attention = sum(
        node.op_type == "MatMul" and not any("weight" in name for name in node.input)
        for node in model.graph.node
    )
    assert graphs[UNET_DECODER].report["layers_in_half"] == attention + 1
    assert graphs[VAE_DECODER].report["layers_in_half"] == 0


# What stays in half, and why


def test_a_mask_stays_in_half_as_it_would_take_all_levels(
    student_bundle, feeds, tmp_path, monkeypatch
):
    path = quantized(student_bundle, TEXT_ENCODER, feeds, tmp_path)
    assert simulated_db(student_bundle, TEXT_ENCODER, feeds, path) > 50
    monkeypatch.setattr(quantize_process, "_MASK", np.inf)
    masked = quantized(student_bundle, TEXT_ENCODER, feeds, tmp_path)
    assert simulated_db(student_bundle, TEXT_ENCODER, feeds, masked) < 40


def test_sigmoids_and_products_stay_in_half_and_in_w8a8_all_but_layers(student_bundle):
    path = student_bundle.graph_path(UNET_ENCODER)
    model = onnx.load(path, load_external_data=False)
    kinds = {node.name: node.op_type for node in model.graph.node}
    whole = {kinds[name] for name in half_nodes(model, path.parent, whole=True)}
    layers = {kinds[name] for name in half_nodes(model, path.parent, whole=False)}
    assert whole == {"Mul", "Sigmoid"}
    assert set(kinds.values()) - layers == {"Conv"}, "products of activations are MatMuls too"


# What ranges are measured on


def test_feeds_are_those_of_a_drawing(student_bundle, feeds):
    assert {path.name for path in feeds.iterdir()} == {
        f"{graph}-{number:05d}.safetensors"
        for graph in student_bundle.manifest.graphs
        for number in range(len(PROMPTS))
    }
    latents = load_file(feeds_files(feeds, VAE_DECODER)[1])
    exact = open_runtime("ort", student_bundle, RuntimeOptions(device="cpu"))
    fed = load_file(feeds_files(feeds, UNET_DECODER)[1])
    made = exact.run(UNET_DECODER, fed)["latents"]
    factor = student_bundle.manifest.vae_scaling_factor
    np.testing.assert_allclose(latents["latent_sample"] * factor, made, rtol=1e-5, atol=1e-6)
    exact.close()


def test_of_many_runs_64_are_measured_evenly(tmp_path):
    for number in range(200):
        (tmp_path / f"unet_decoder-{number:05d}.safetensors").touch()
    chosen = [int(Path(file).stem[-5:]) for file in feeds_files(tmp_path, UNET_DECODER)]
    assert len(chosen) == 64
    assert (chosen[0], chosen[-1]) == (0, 199)
    assert set(np.diff(chosen)) <= {3, 4}


def test_runs_of_fewer_steps_than_the_context_takes_are_not_measured(micro_pipeline, tmp_path):
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=3))
    bundle = export_onnx(student, tmp_path / "b")
    (tmp_path / "feeds").mkdir()
    record_feeds(bundle, PROMPTS[:2], tmp_path / "feeds", steps=3)
    files = feeds_files(tmp_path / "feeds", UNET_DECODER)
    assert [load_file(file)["timesteps"].shape for file in files] == [(3,), (3,)]


def test_a_disk_that_is_full_of_feeds_is_a_full_disk(student_bundle, tmp_path):
    (tmp_path / f"{TEXT_ENCODER}-00000.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        record_feeds(student_bundle, PROMPTS[:1], tmp_path)
    assert caught.value.errno == errno.ENOSPC


# Refusals


@pytest.mark.parametrize(
    ("options", "message", "next_step"),
    [
        ({"precision": "w4a16"}, "unknown precision 'w4a16'", None),
        ({"precision": "w8a16"}, "measures ranges on prompts", "--calibration-prompts FILE"),
        ({"prompts": PROMPTS}, "--calibration-prompts is for --precision w8a16", "w8a16"),
        ({"prove": "some"}, "unknown proof 'some'", None),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options, message, next_step):
    with pytest.raises(UsageError, match=message) as caught:
        QnnOptions(**options)
    assert next_step is None or next_step in caught.value.next_step


def test_what_cannot_be_drawn_or_is_in_half_already_is_not_quantized(micro_bundle, student_bundle):
    options = QnnOptions(precision="w8a16", prompts=PROMPTS)
    with pytest.raises(UsageError, match="has no text_encoder") as caught:
        compile_qnn(micro_bundle, options)
    assert "--base" in caught.value.next_step
    manifest = student_bundle.manifest
    half = replace(manifest.graphs[VAE_DECODER], precision="fp16")
    mixed = replace(manifest, graphs={**manifest.graphs, VAE_DECODER: half})
    with pytest.raises(UsageError, match=r"vae_decoder of .* is in fp16; w8a16 is made of"):
        compile_qnn(Bundle(student_bundle.root, mixed), options)
    controlled = {**manifest.graphs, "controlnet": manifest.graphs[UNET_ENCODER]}
    with pytest.raises(UsageError, match="has a ControlNet"):
        compile_qnn(Bundle(student_bundle.root, replace(manifest, graphs=controlled)), options)


def test_a_plan_of_another_student_is_refused(student_bundle):
    other = replace(plan_for(student_bundle), student="another")
    with pytest.raises(UsageError, match="made for another student"):
        compile_qnn(student_bundle, QnnOptions(precision="w8a8", prompts=PROMPTS, plan=other))


def test_a_plan_that_keeps_a_layer_that_is_not_there_is_refused(student_bundle):
    options = QnnOptions(
        precision="w8a8", prompts=PROMPTS, plan=plan_for(student_bundle, misspelled=FLOAT)
    )
    with pytest.raises(UsageError, match="keeps misspelled in float, which unet_decoder does not"):
        compile_qnn(student_bundle, options)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("w8a8", "Try --precision w8a16, or a --plan that keeps more layers in half, or accept"),
        ("w8a16", "Try --precision fp16, or accept the loss with --allow-parity-loss"),
        ("fp16", "Accept the loss with --allow-parity-loss"),
    ],
)
def test_what_misses_its_gate_is_told_which_numbers_are_finer(w8a16_bundle, precision, advice):
    prompts = () if precision == "fp16" else PROMPTS
    backend = QnnBackend(QnnOptions(precision=precision, prompts=prompts))
    failed = next(
        each for each in w8a16_bundle.manifest.compiled["qnn-v75"].parity if not each.passed
    )
    assert backend.if_lost(failed).startswith(advice)
