"""The TensorRT runtime as far as it goes without a GPU, and on one where there is one.

Here: which memory is shared, what is checked, every refusal, and that a device needs numpy only.
With a GPU (marker gpu): parity with ONNX Runtime, CUDA graph against none, low memory against all.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_runtime import FakeRuntime
from hypothesis import given
from hypothesis import strategies as st
from test_imports import OLDEST, _oldest_python
from test_layering import ROOT

from tiue_export import Pipeline
from tiue_export.bundle.chain import LATENTS, NOISE, PICTURE, SCALED_LATENTS, TEXT, TOKENS
from tiue_export.bundle.engine_identity import graph_identity, rtx_target, tensorrt_target
from tiue_export.bundle.manifest import Compiled, CompiledGraph
from tiue_export.bundle.read import Bundle, file_records, open_bundle
from tiue_export.bundle.write import add_compiled, compiled_folder
from tiue_export.errors import (
    BundleError,
    MissingExtraError,
    ResourceError,
    RuntimeFailure,
    TiueError,
    UsageError,
)
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes.buffers import (
    EngineDescription,
    EngineTensor,
    check_engine_fits,
    check_size,
    checked_chain_feeds,
    checked_feeds,
    concrete_shape,
    plan_memory,
    scratch_size_bytes,
)
from tiue_export.runtimes.cuda_device import Cuda, cuda_failure
from tiue_export.runtimes.ort.runtime import OrtRuntime
from tiue_export.runtimes.trt.divide import PTX
from tiue_export.runtimes.trt.engine import EngineLoader, Plan, RuntimeCache
from tiue_export.runtimes.trt.runtime import ONE_GRAPH_STAGE, DeviceMemory, choose_engines
from tiue_export.specs import (
    BATCH,
    CONTROLNET,
    GRAPH_NAMES,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    ChainResult,
    GraphSpec,
    RuntimeOptions,
)
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.kept_folder import KeptFolder
from tiue_export.system.tensorrt_flavor import (
    FOLDERS,
    Device,
    installed_flavors,
    load_flavor,
    this_device,
)

ORIN = Device("Orin", "8.7", "R36, REVISION: 4.7", "12.6", unified_memory=True)
RTX_4090 = Device("NVIDIA GeForce RTX 4090", "8.9", "580.65", "13.0")
REBUILD = "Rebuild with: tiue-export trt --bundle fox"


def no_gpu() -> str | None:
    """Why the tests for a GPU cannot run here, or None."""
    try:
        return None if this_device() else "no NVIDIA GPU or no driver here"
    except TiueError as error:
        return error.message


GPU_REASON = no_gpu()
without_gpu = pytest.mark.skipif(GPU_REASON is None, reason="this machine has a GPU")
needs_rtx = pytest.mark.skipif(
    "rtx" not in installed_flavors(), reason="tensorrt-rtx is not installed"
)


def on_gpu(test):
    """Marked gpu, skipped with the reason where there is none."""
    skip = pytest.mark.skipif(GPU_REASON is not None, reason=str(GPU_REASON))
    return pytest.mark.gpu(skip(test))


@pytest.fixture(scope="module")
def specs(tiny_bundle) -> list[GraphSpec]:
    return [tiny_bundle.spec(graph) for graph in GRAPH_NAMES]


def dynamic(specs):
    """The same contract with an open batch."""

    def opened(tensors):
        return tuple(replace(t, shape=(BATCH, *t.shape[1:])) for t in tensors)

    return [GraphSpec(s.name, opened(s.inputs), opened(s.outputs)) for s in specs]


def described(spec: GraphSpec, size_range=None, scratch_bytes=0) -> EngineDescription:
    """The engine that TensorRT would build from a spec; dynamic with a range of sizes."""
    tensors = []
    for is_input, group in ((True, spec.inputs), (False, spec.outputs)):
        for t in group:
            shape = tuple(-1 if isinstance(side, str) else side for side in t.shape)
            limits = size_range if is_input and -1 in shape else None
            tensors.append(EngineTensor(t.name, is_input, t.dtype, shape, limits))
    return EngineDescription(spec.name, tuple(tensors), scratch_bytes)


# --- which memory is shared -----------------------------------------------------------------------


def test_the_decoder_reads_where_the_encoder_wrote(specs):
    memory = plan_memory(specs, 1)
    written = {s.name: memory.places[UNET_ENCODER][s.name] for s in specs[1].outputs}
    read = memory.places[UNET_DECODER]
    assert len(written) == 7
    assert all(read[name] == place for name, place in written.items())


def test_the_text_embedding_goes_by_two_names_and_lies_in_one_place(specs):
    places = plan_memory(specs, 1).places
    assert places[TEXT_ENCODER] == {"input_ids": TOKENS, "last_hidden_state": TEXT}
    assert places[UNET_ENCODER]["encoder_hidden_states"] == TEXT
    assert places[UNET_DECODER]["encoder_hidden_states"] == TEXT


def test_the_noise_and_the_picture_have_one_name_and_lie_apart(specs):
    places = plan_memory(specs, 1).places
    assert places[UNET_ENCODER]["sample"] == places[UNET_DECODER]["sample"] == NOISE
    assert places[VAE_DECODER] == {"latent_sample": SCALED_LATENTS, "sample": PICTURE}
    assert places[UNET_DECODER]["latents"] == LATENTS


def test_every_output_has_a_place_that_no_other_output_has(specs):
    places = plan_memory(specs, 1).places
    outputs = [places[spec.name][tensor.name] for spec in specs for tensor in spec.outputs]
    assert len(outputs) == len(set(outputs))


@given(batch=st.integers(1, 9))
def test_memory_grows_with_the_batch_and_holds_each_tensor_once(tiny_bundle, batch):
    opened = dynamic([tiny_bundle.spec(graph) for graph in GRAPH_NAMES])
    one, many = plan_memory(opened, 1), plan_memory(opened, batch)
    assert many.size_bytes == batch * one.size_bytes
    assert many.tensors[NOISE].shape == (batch, 4, 8, 8)
    assert many.tensors[PICTURE].size_bytes == batch * 3 * 64 * 64 * 4
    assert many.tensors.keys() == {p for places in many.places.values() for p in places.values()}


def test_memory_says_which_graph_it_is_for(specs):
    memory = plan_memory(specs, 1)
    assert memory.graph_of(TEXT) == TEXT_ENCODER
    assert memory.graph_of("mid_sample") == UNET_ENCODER
    assert memory.graph_of(PICTURE) == VAE_DECODER


def test_a_tensor_in_two_forms_is_refused_naming_both(specs):
    half = tuple(
        replace(t, dtype="float16") if t.name == "mid_sample" else t for t in specs[2].inputs
    )
    with pytest.raises(BundleError) as caught:
        plan_memory([*specs[:2], replace(specs[2], inputs=half)], 1)
    assert caught.value.message == (
        "unet_decoder has mid_sample as float16 (1, 48, 2, 2), "
        "unet_encoder as float32 (1, 48, 2, 2)"
    )


@given(st.lists(st.integers(0, 10**10), max_size=4))
def test_scratch_memory_is_the_largest_need_rounded_up_to_256_bytes(sizes):
    size_bytes = scratch_size_bytes(sizes)
    assert size_bytes % 256 == 0
    assert max(sizes, default=0) <= size_bytes < max(sizes, default=0) + 256


# --- feeds ----------------------------------------------------------------------------------------


def feeds_of(spec: GraphSpec, batch: int = 1):
    shapes = {t.name: [batch if isinstance(s, str) else s for s in t.shape] for t in spec.inputs}
    return {t.name: np.zeros(shapes[t.name], t.dtype) for t in spec.inputs}


def test_feeds_become_contiguous_without_being_changed(specs):
    fortran = {k: np.asfortranarray(v) for k, v in feeds_of(specs[1]).items()}
    chosen, batch = checked_feeds(specs[1], {**fortran, "other": np.zeros(1)})
    assert (batch, chosen.keys()) == (1, fortran.keys())
    assert all(array.flags.c_contiguous for array in chosen.values())
    assert not fortran["sample"].flags.c_contiguous


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((1, 4, 8, 8))}, 'input "sample" is float64; the bundle expects'),
        ({"sample": np.zeros((1, 4, 8, 9), "f4")}, 'input "sample" has shape (1, 4, 8, 9)'),
    ],
)
def test_a_wrong_feed_is_refused_before_it_reaches_the_device(specs, change, message):
    with pytest.raises(RuntimeFailure) as caught:
        checked_feeds(specs[1], {**feeds_of(specs[1]), **change})
    assert f"unet_encoder: {message}" in caught.value.message


def test_feeds_of_unequal_batch_are_refused(specs):
    spec = dynamic(specs)[1]
    feeds = {**feeds_of(spec, 2), "sample": np.zeros((3, 4, 8, 8), np.float32)}
    with pytest.raises(RuntimeFailure) as caught:
        checked_feeds(spec, feeds)
    assert caught.value.message == (
        "unet_encoder: the inputs have unequal batches: sample 3, encoder_hidden_states 2"
    )


def test_a_drawing_starts_from_tokens_and_noise(specs):
    tokens, noise = np.zeros((2, 77), np.int64), np.zeros((2, 4, 8, 8), np.float32)
    chosen, batch = checked_chain_feeds(dynamic(specs), {TOKENS: tokens, NOISE: noise})
    assert (batch, list(chosen)) == (2, [TOKENS, NOISE])
    with pytest.raises(RuntimeFailure, match="drawing: the inputs have unequal batches"):
        checked_chain_feeds(dynamic(specs), {TOKENS: tokens[:1], NOISE: noise})
    with pytest.raises(RuntimeFailure, match='drawing: input "input_ids" is int32'):
        checked_chain_feeds(dynamic(specs), {TOKENS: tokens.astype(np.int32), NOISE: noise})


# --- engines against the bundle -------------------------------------------------------------------


def test_the_engine_of_a_graph_fits_it_static_or_dynamic(specs):
    for spec, opened in zip(specs, dynamic(specs), strict=True):
        check_engine_fits(described(spec), spec, REBUILD)
        check_engine_fits(described(spec), opened, REBUILD)  # static engine, dynamic graph
        check_engine_fits(described(opened, (1, 4)), opened, REBUILD)


def changed(engine: EngineDescription, tensor: str, **fields) -> EngineDescription:
    tensors = tuple(replace(t, **fields) if t.name == tensor else t for t in engine.tensors)
    return replace(engine, tensors=tensors)


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"dtype": "float16"}, 'output "latents" as float16 (1, 4, 8, 8)'),
        ({"shape": (1, 4, 8, 16)}, 'output "latents" as float32 (1, 4, 8, 16)'),
        ({"shape": (4, 8, 8)}, 'output "latents" as float32 (4, 8, 8)'),
        ({"name": "eps"}, "the outputs eps"),
    ],
)
def test_an_engine_with_another_output_is_refused(specs, fields, got):
    engine = changed(described(specs[2]), "latents", **fields)
    with pytest.raises(BundleError) as caught:
        check_engine_fits(engine, specs[2], REBUILD)
    assert caught.value.message.startswith(
        f"the plan of unet_decoder has {got}; the bundle expects"
    )
    assert caught.value.next_step == REBUILD


def test_an_engine_with_another_input_is_refused(specs):
    engine = changed(described(specs[3]), "latent_sample", name="latents")
    with pytest.raises(BundleError) as caught:
        check_engine_fits(engine, specs[3], REBUILD)
    assert caught.value.message == (
        "the plan of vae_decoder has the inputs latents; the bundle expects latent_sample"
    )


@pytest.mark.parametrize(
    ("limits", "batch", "takes", "option"),
    [
        ((1, 1), 4, "1", "--batch 1:1:4"),
        ((2, 4), 1, "2 to 4", "--batch 1:2:4"),
        ((1, 4), 5, "1 to 4", "--batch 1:1:5"),
    ],
)
def test_a_batch_outside_the_engine_is_refused_with_the_option(specs, limits, batch, takes, option):
    spec = dynamic(specs)[1]
    engine = described(spec, limits)
    assert engine.size_range(spec) == limits
    for legal in limits:
        check_size(engine, spec, legal, REBUILD)
    with pytest.raises(RuntimeFailure) as caught:
        check_size(engine, spec, batch, REBUILD)
    assert caught.value.message == (
        f"unet_encoder: the batch is {batch}; this engine takes {takes}"
    )
    assert caught.value.next_step == f"{REBUILD} {option}"


# --- a model in a loop ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop_specs(faster_bundle) -> dict[str, GraphSpec]:
    return {graph: faster_bundle.spec(graph) for graph in faster_bundle.manifest.graphs}


def test_in_a_loop_the_text_of_both_prompts_lies_apart_from_the_text_encoders(loop_specs):
    memory = plan_memory(loop_specs.values(), 3, in_loop=True)
    text = memory.places[TEXT_ENCODER]["last_hidden_state"]
    both = memory.places[UNET_ENCODER]["encoder_hidden_states"]
    assert memory.places[UNET_DECODER]["encoder_hidden_states"] == both
    assert (memory.tensors[text].shape[0], memory.tensors[both].shape[0]) == (1, 2)
    assert memory.places[UNET_DECODER]["mid_sample"] == memory.places[UNET_ENCODER]["mid_sample"]


def test_what_a_controlnet_adds_lies_apart_from_what_it_is_added_to(loop_specs):
    encoder = loop_specs[UNET_ENCODER]
    half = tuple(replace(tensor, dtype="float16") for tensor in encoder.outputs)
    control = GraphSpec(CONTROLNET, encoder.inputs, half)
    places = plan_memory([control, *loop_specs.values()], 1, in_loop=True).places
    assert places[CONTROLNET]["sample"] == places[UNET_ENCODER]["sample"]
    added = {places[CONTROLNET][tensor.name] for tensor in half}
    assert not added & set(places[UNET_ENCODER].values())
    assert len(added) == len(half)


@given(steps=st.integers(1, 30))
def test_in_a_loop_the_decoder_has_two_rows_for_each_step_and_a_picture(loop_specs, steps):
    tensors = plan_memory(loop_specs.values(), steps, in_loop=True).tensors
    assert tensors["timesteps"].shape == (steps,)
    assert tensors["outputs"].shape == (2 * steps, 4, 8, 8)


def test_the_size_of_a_loops_graph_is_counted_where_its_axis_is_open(loop_specs):
    for graph, size in ((UNET_ENCODER, 2), (UNET_DECODER, 5)):
        spec = loop_specs[graph]
        feeds = {t.name: np.zeros(concrete_shape(t, 5), t.dtype) for t in spec.inputs}
        assert checked_feeds(spec, feeds)[1] == size


def test_a_group_longer_than_the_engine_takes_is_refused_with_the_rows_to_ask_for(loop_specs):
    encoder, decoder = loop_specs[UNET_ENCODER], loop_specs[UNET_DECODER]
    check_size(described(encoder), encoder, 99, REBUILD)  # it has no open axis
    engine = described(decoder, (1, 4))
    check_size(engine, decoder, 4, REBUILD)
    with pytest.raises(RuntimeFailure) as caught:
        check_size(engine, decoder, 6, REBUILD)
    assert caught.value.message == (
        "unet_decoder: 6 steps were asked for at once; this engine takes 1 to 4"
    )
    assert caught.value.next_step == f"{REBUILD} --max-decoder-rows 12"


class HostBuffer:
    """Memory that stands for the GPU's: it has an address of its own and knows when it is freed."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.freed = size_bytes, False

    def free(self) -> None:
        assert not self.freed
        self.freed = True


class HostCuda:
    def allocate(self, size_bytes, purpose):
        return HostBuffer(size_bytes)


def test_groups_of_other_lengths_move_timesteps_and_outputs_alone(loop_specs):
    one, many = (plan_memory(loop_specs.values(), n, in_loop=True) for n in (1, 5))
    memory = DeviceMemory(HostCuda(), None, one)
    before = {value: memory.buffer(value) for value in one.tensors}
    assert memory.replan(many) == {"timesteps", "outputs"}
    after = {value: memory.buffer(value) for value in many.tensors}
    assert {v for v in after if after[v] is not before[v]} == {"timesteps", "outputs"}
    assert {v for v in before if before[v].freed} == {"timesteps", "outputs"}
    assert after["outputs"].size_bytes == 5 * before["outputs"].size_bytes
    assert memory.replan(many) == set()
    memory.free()
    assert all(buffer.freed for buffer in after.values())


@needs_rtx
def test_the_longest_run_of_a_loops_decoder_is_read_from_its_engines(faster_copy):
    version, flags = load_flavor("rtx").version, {"batch": "1:1:1", "decoder_steps": "1:5:5"}
    bundle = with_plans(faster_copy, "rtx", version, rtx_target(("8.9",)), flags)
    assert choose_engines(bundle, RTX_4090).step_limit == 5


@needs_rtx
def test_engines_of_a_student_have_no_longest_run(bundle_copy):
    version = load_flavor("rtx").version
    bundle = with_plans(open_bundle(bundle_copy), "rtx", version, rtx_target(("8.9",)))
    assert choose_engines(bundle, RTX_4090).step_limit is None


class LimitedOrt(OrtRuntime):
    """ONNX Runtime, refusing longer decoder runs than an engine for `limit` steps would take."""

    def __init__(self, bundle, limit):
        super().__init__(bundle, "cpu", RuntimeOptions(device="cpu"))
        self._limit, self.taken = limit, []

    def step_limit(self):
        return self._limit

    def run(self, graph, feeds):
        if graph == UNET_DECODER:
            assert len(feeds["timesteps"]) <= self._limit
            self.taken.append(len(feeds["timesteps"]))
        return super().run(graph, feeds)


@pytest.mark.parametrize(("limit", "taken"), [(1, [1] * 6), (2, [1, 2, 2, 1]), (9, [1, 2, 3])])
def test_a_group_is_cut_into_pieces_that_the_engine_takes(faster_bundle, limit, taken):
    runtime = LimitedOrt(faster_bundle, limit)
    with Pipeline.open(faster_bundle, runtime) as pipeline:
        picture = pipeline("a red fox", seed=3).pictures[0]
    with Pipeline.open(faster_bundle, "ort") as pipeline:
        expected = pipeline("a red fox", seed=3).pictures[0]
    assert runtime.taken == taken
    assert psnr_db(expected.latents, picture.latents) >= GATES_PSNR_DB["fp32-loop"]


def test_parity_asks_no_more_of_an_engine_than_it_takes(faster_bundle):
    runtime = LimitedOrt(faster_bundle, 2)
    records = measure_runtime(faster_bundle, runtime, load_reference(faster_bundle))
    assert {"outputs", "latents"} <= {record.subject for record in records}
    assert all(record.passed for record in records)
    assert runtime.taken[0] == 2


# --- refusals before anything is deserialized -----------------------------------------------------


def with_plans(bundle: Bundle, flavor: str, version: str, target, flags=None) -> Bundle:
    """The bundle with plans of the right identity that hold no machine code."""
    flags, folder_name = flags or {"batch": "1:1:1"}, FOLDERS[flavor]
    with compiled_folder(bundle, folder_name) as folder:
        for graph in GRAPH_NAMES:
            (folder / f"{graph}.plan").write_bytes(b"a plan of " + graph.encode())
        records = file_records(folder, [f"{graph}.plan" for graph in GRAPH_NAMES])
        graphs = {
            graph: CompiledGraph(
                f"{folder_name}/{graph}.plan",
                graph_identity(bundle.manifest.graphs[graph], flavor, version, target, flags),
                {f"{folder_name}/{graph}.plan": records[f"{graph}.plan"]},
            )
            for graph in GRAPH_NAMES
        }
        compiled = Compiled(flavor, version, target, flags, graphs)
        return add_compiled(bundle, folder_name, folder, compiled)


@without_gpu
def test_no_gpu_at_generate_is_one_clear_message(bundle_copy, capfd):
    cli = importlib.import_module("tiue_export.apps.cli")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", str(bundle_copy), "a red fox", "--runtime", "trt"])
    out, err = capfd.readouterr()
    assert (stopped.value.code, out) == (RuntimeFailure.exit_code, "")
    assert err == (
        "error: no NVIDIA GPU or no driver was found: TensorRT engines cannot run here\n"
        "  next: Check nvidia-smi, or run the bundle with --runtime ort.\n"
    )


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_another_device_than_an_nvidia_gpu_is_refused(tiny_bundle, device):
    with pytest.raises(UsageError) as caught:
        open_runtime("trt", tiny_bundle, RuntimeOptions(device=device))
    assert caught.value.message == (
        f"--device is {device}; TensorRT engines run on an NVIDIA GPU only"
    )


def test_a_bundle_without_engines_says_how_to_build_them(tiny_bundle):
    with pytest.raises(BundleError) as caught:
        choose_engines(tiny_bundle, RTX_4090)
    assert "plans" in caught.value.message
    assert "tiue-export trt --bundle" in caught.value.next_step


@pytest.mark.skipif("tensorrt" in installed_flavors(), reason="tensorrt is installed")
def test_engines_of_a_tensorrt_that_is_not_installed_say_what_to_install(tiny_bundle, bundle_copy):
    bundle = with_plans(open_bundle(bundle_copy), "tensorrt", "10.3.0", tensorrt_target(ORIN))
    with pytest.raises(MissingExtraError) as caught:
        choose_engines(bundle, ORIN)
    assert caught.value.message == "TensorRT is not installed"
    assert "pip install" in caught.value.next_step


@needs_rtx
def test_engines_that_fit_are_chosen_with_their_files_and_batches(bundle_copy):
    version = load_flavor("rtx").version
    flags = {"batch": "1:2:4", "version_compatible": True}
    bundle = with_plans(open_bundle(bundle_copy), "rtx", version, rtx_target(("8.9",)), flags)
    engines = choose_engines(bundle, RTX_4090)
    assert (engines.flavor.name, engines.batch_range) == ("rtx", (1, 4))
    assert list(engines.plans) == list(GRAPH_NAMES)
    plan = engines.plans[VAE_DECODER]
    assert (plan.path, plan.version_compatible) == (bundle.root / "trt-rtx/vae_decoder.plan", True)
    assert plan.path.read_bytes() == b"a plan of vae_decoder"


@needs_rtx
@pytest.mark.skipif("tensorrt" in installed_flavors(), reason="tensorrt is installed")
def test_of_two_sets_of_engines_the_one_that_can_run_here_is_chosen(bundle_copy):
    version = load_flavor("rtx").version
    bundle = with_plans(open_bundle(bundle_copy), "tensorrt", "11.4.0", tensorrt_target(RTX_4090))
    bundle = with_plans(bundle, "rtx", version, rtx_target(("8.9",)))
    assert choose_engines(bundle, RTX_4090).flavor.name == "rtx"


@needs_rtx
@pytest.mark.parametrize(
    ("version", "target", "message"),
    [
        (None, ("8.6",), "the plans were built for compute capability 8.6, this is NVIDIA GeForce"),
        ("1.2.0.54", ("8.9",), "the plans were built for TensorRT-RTX 1.2.0.54, this is "),
    ],
)
def test_engines_for_another_card_or_version_are_refused_with_the_line(
    bundle_copy, version, target, message
):
    version = version or load_flavor("rtx").version
    bundle = with_plans(open_bundle(bundle_copy), "rtx", version, rtx_target(target))
    with pytest.raises(RuntimeFailure) as caught:
        choose_engines(bundle, RTX_4090)
    assert caught.value.message.startswith(message)
    assert caught.value.next_step == (
        f"Rebuild with: tiue-export trt --bundle {bundle.root} --flavor rtx --sm 89"
    )


def test_a_plan_with_one_byte_flipped_does_not_open(bundle_copy):
    bundle = with_plans(open_bundle(bundle_copy), "rtx", "1.7.1", rtx_target(("8.9",)))
    path = bundle.root / "trt-rtx/unet_decoder.plan"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(BundleError, match=r"trt-rtx/unet_decoder\.plan was altered"):
        Pipeline.open(bundle.root, "trt")


# --- TensorRT's own refusals, from the real library -----------------------------------------------


def rtx_loader(free=(1_500_000_000, 8_000_000_000)) -> EngineLoader:
    return EngineLoader(load_flavor("rtx"), RTX_4090.name, REBUILD, lambda: free)


def rtx_plan(folder: Path) -> Path:
    """A real plan of the smallest network, made without a GPU."""
    trt = load_flavor("rtx").trt
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (1, 4))
    y = network.add_activation(x, trt.ActivationType.RELU).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    path = folder / "relu.plan"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return path


@needs_rtx
@without_gpu
def test_a_real_plan_without_a_driver_is_refused_with_the_cause(tmp_path, capfd):
    loader = rtx_loader()
    with pytest.raises(RuntimeFailure) as caught:
        loader.load(Plan(UNET_DECODER, rtx_plan(tmp_path), "0" * 64))
    assert caught.value.message.startswith(
        f"{load_flavor('rtx').title} cannot load the plan of unet_decoder: "
    )
    assert "CUDA driver" in caught.value.message
    assert "nvidia-smi" in caught.value.next_step
    assert capfd.readouterr().err == ""  # TensorRT's own log lines are in the message instead


@needs_rtx
def test_a_file_that_is_no_plan_is_refused_with_the_line_that_rebuilds(tmp_path):
    path = tmp_path / "vae_decoder.plan"
    path.write_bytes(b"no plan at all" * 100)
    with pytest.raises(RuntimeFailure) as caught:
        rtx_loader().load(Plan(VAE_DECODER, path, "0" * 64))
    assert "cannot load the plan of vae_decoder: " in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.next_step == f"{REBUILD} --rebuild"


# --- CUDA's failures ------------------------------------------------------------------------------


def test_out_of_memory_says_for_which_graph_and_how_much_was_free():
    failure = cuda_failure(
        "cudaMalloc",
        "cudaErrorMemoryAllocation",
        "out of memory",
        "unet_decoder: scratch memory (1,200 MB)",
        (310_000_000, 7_620_000_000),
    )
    assert isinstance(failure, ResourceError)
    assert failure.message == (
        "unet_decoder: scratch memory (1,200 MB): the GPU ran out of memory: cudaMalloc failed "
        "with cudaErrorMemoryAllocation (out of memory); 310 MB of 7,620 MB were free"
    )
    assert "--low-memory" in failure.next_step


@pytest.mark.parametrize(
    ("code", "message", "step"),
    [
        ("cudaErrorNoDevice", "no NVIDIA GPU can be used: cudaMalloc failed with", "nvidia-smi"),
        ("cudaErrorIllegalAddress", "cudaMalloc failed with cudaErrorIllegalAddress", "doctor"),
    ],
)
def test_a_failed_call_names_itself_the_error_and_the_next_step(code, message, step):
    failure = cuda_failure("cudaMalloc", code, "text")
    assert isinstance(failure, RuntimeFailure)
    assert failure.message.startswith(message)
    assert step in failure.next_step


@without_gpu
def test_cuda_without_a_driver_is_explained():
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    with pytest.raises(RuntimeFailure) as caught:
        Cuda()
    assert caught.value.message.startswith("no NVIDIA GPU can be used: cudaFree failed with cuda")


def test_cuda_without_cuda_python_says_what_to_install():
    told = alone("import tiue_export.runtimes.cuda_device as device\ndevice.Cuda()")
    assert told["error"] == "MissingExtraError"
    assert told["message"].startswith("CUDA is reached through cuda-python, which is not installed")
    assert "pip install cuda-bindings" in told["message"]


def test_the_kernel_that_scales_is_valid_for_every_gpu_of_tensorrt(tmp_path):
    assembler = shutil.which("ptxas")
    if assembler is None:
        pytest.skip("ptxas (CUDA toolkit) is not installed")
    source = tmp_path / "divide.ptx"
    source.write_text(PTX)
    for architecture in ("sm_75", "sm_87", "sm_90", "sm_120"):
        command = [assembler, f"-arch={architecture}", source, "-o", tmp_path / "out"]
        subprocess.run(command, check=True)


# --- what is kept on disk -------------------------------------------------------------------------


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert user_cache_folder() == tmp_path / "tiue-export"


def test_compiled_kernels_are_kept_and_read_back_and_written_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def kernels() -> RuntimeCache:
        return RuntimeCache(KeptFolder("tensorrt-rtx", "unet_encoder-1"))

    assert kernels().read() == b""
    for content in (b"kernels", b"more kernels"):
        kernels().write(content)
        assert kernels().read() == content


# --- what a device must have ----------------------------------------------------------------------

CORE = [
    f"tiue_export.runtimes.{name}"
    for name in ("trt.runtime", "trt.engine", "buffers", "cuda_device", "trt.divide")
]


def alone(code: str, python: str = sys.executable) -> dict[str, object]:
    """Run code where only Python, numpy and this project can be imported; its error or modules."""
    guard = (
        "import json, sys\n"
        "allowed = {*sys.stdlib_module_names, 'numpy', 'tiue_export', 'runtimes'}\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.partition('.')[0]\n"
        "        if top not in allowed and not top.startswith('_'):\n"
        "            raise ModuleNotFoundError(f'{name} is not on a bare device', name=name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import importlib, runtimes, tiue_export\n"
        "sys.modules['tiue_export.runtimes'] = runtimes\n"
        "told = {'error': None}\n"
        "try:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "except Exception as error:\n"
        "    told = {'error': type(error).__name__, 'message': str(error)}\n"
        "told['modules'] = sorted(sys.modules)\n"
        "print(json.dumps(told))\n"
    )
    done = subprocess.run(
        [python, "-I", "-B", "-W", "error", "-c", guard],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_runtime_loads_with_numpy_alone():
    told = alone("\n".join(f"import {name}" for name in CORE))
    assert told["error"] is None, told
    assert set(CORE) <= set(told["modules"])
    # The package `cuda` itself is there from the start: cuda-bindings loads it in every Python.
    heavy = {"tensorrt", "tensorrt_rtx", "cuda.bindings.runtime", "torch", "PIL"}
    assert not heavy & set(told["modules"])


def test_the_runtime_loads_on_python_3_10_with_numpy_alone():
    python = _oldest_python()
    if python is None:
        pytest.skip(f"no python{OLDEST[0]}.{OLDEST[1]} with numpy on PATH or in ~/.pyenv/versions")
    told = alone("\n".join(f"import {name}" for name in CORE), python)
    assert told["error"] is None, told


# --- the pipeline's fast path ---------------------------------------------------------------------


class ChainingFake(FakeRuntime):
    """The fake, offering a whole drawing as one call; it counts which way was taken."""

    def __init__(self, bundle, *, chains=True, batches=(1, 4)):
        super().__init__(bundle)
        self._factor = bundle.manifest.vae_scaling_factor
        self._chains, self._batches = chains, batches
        self.calls = []

    def batch_range(self):
        return self._batches

    def run(self, graph, feeds):
        self.calls.append(graph)
        return super().run(graph, feeds)

    def run_chain(self, input_ids, noise):
        self.calls.append(len(noise))
        if not self._chains:
            return None
        run = super().run
        text = run(TEXT_ENCODER, {"input_ids": input_ids})["last_hidden_state"]
        pool = {"sample": noise, "encoder_hidden_states": text}
        pool |= run(UNET_ENCODER, self._bundle.spec(UNET_ENCODER).select(pool))
        latents = run(UNET_DECODER, self._bundle.spec(UNET_DECODER).select(pool))["latents"]
        scaled = (latents / self._factor).astype(np.float32)
        picture = run(VAE_DECODER, {"latent_sample": scaled})["sample"]
        return ChainResult(latents, picture, {"all": 1.5})


def assert_same_pictures(left, right):
    for one, other in zip(left.pictures, right.pictures, strict=True):
        assert (one.prompt, one.seed) == (other.prompt, other.seed)
        np.testing.assert_array_equal(one.latents, other.latents)
        assert one.image.tobytes() == other.image.tobytes()


def test_a_chain_draws_what_the_graphs_one_by_one_draw(tiny_bundle):
    expected = Pipeline.open(tiny_bundle, FakeRuntime(tiny_bundle))(["a red fox", "a dog"], seed=3)
    runtime = ChainingFake(tiny_bundle)
    result = Pipeline.open(tiny_bundle, runtime)(["a red fox", "a dog"], seed=3)
    assert_same_pictures(result, expected)
    assert runtime.calls == [1, 1]
    assert result.stage_latency_ms == {"all": [1.5, 1.5]}


def test_a_runtime_that_cannot_chain_now_runs_graph_by_graph(tiny_bundle):
    expected = Pipeline.open(tiny_bundle, FakeRuntime(tiny_bundle))("a red fox")
    runtime = ChainingFake(tiny_bundle, chains=False)
    result = Pipeline.open(tiny_bundle, runtime)("a red fox")
    assert_same_pictures(result, expected)
    assert runtime.calls == [1, *GRAPH_NAMES]
    assert list(result.stage_latency_ms) == list(GRAPH_NAMES)


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [((1, 1), [1] * 5), ((1, 2), [2, 2, 1]), ((3, 3), [3, 3]), ((1, 8), [4, 1])],
)
def test_a_dynamic_bundle_is_drawn_in_batches_that_the_engines_take(tiny_bundle, batches, sizes):
    manifest = tiny_bundle.manifest
    graphs = {
        spec.name: replace(manifest.graphs[spec.name], inputs=spec.inputs, outputs=spec.outputs)
        for spec in dynamic([tiny_bundle.spec(graph) for graph in GRAPH_NAMES])
    }
    latents = (BATCH, *manifest.latent_shape[1:])
    bundle = Bundle(tiny_bundle.root, replace(manifest, latent_shape=latents, graphs=graphs))
    runtime = ChainingFake(bundle, batches=batches)
    result = Pipeline.open(bundle, runtime)([f"prompt {i}" for i in range(5)])
    assert (len(result.pictures), runtime.calls) == (5, sizes)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_bundle(tiny_student, tmp_path_factory):
    """The tiny student in half precision with engines for the GPU that is here."""
    from tiue_export import export_onnx
    from tiue_export.export.trt.bundle import compile_trt
    from tiue_export.graphs.options import ExportOptions

    folder = tmp_path_factory.mktemp("gpu") / "tiny-fp16"
    return compile_trt(export_onnx(tiny_student, folder, ExportOptions(precision="fp16")))


def drawn(bundle, options=None, prompts=("a red fox", "a dog")):
    with Pipeline.open(bundle, "trt", options) as pipeline:
        pipeline(prompts[0])  # the drawing proper is then a replay
        return pipeline(list(prompts), seed=5)


@on_gpu
def test_engines_on_a_gpu_agree_with_onnx_runtime(gpu_bundle):
    with Pipeline.open(gpu_bundle, "ort", RuntimeOptions(device="cpu")) as pipeline:
        expected = pipeline(["a red fox", "a dog"], seed=5)
    for one, other in zip(drawn(gpu_bundle).pictures, expected.pictures, strict=True):
        assert psnr_db(other.latents, one.latents) >= GATES_PSNR_DB["fp16"]


@on_gpu
def test_a_cuda_graph_draws_what_the_engines_draw_without_one(gpu_bundle):
    graph = drawn(gpu_bundle, RuntimeOptions(cuda_graph=True))
    eager = drawn(gpu_bundle, RuntimeOptions(cuda_graph=False))
    assert list(graph.stage_latency_ms) == [ONE_GRAPH_STAGE]
    assert list(eager.stage_latency_ms) == list(GRAPH_NAMES)
    assert_same_pictures(graph, eager)


@on_gpu
def test_low_memory_draws_the_same_and_holds_less(gpu_bundle):
    cuda = Cuda()
    with Pipeline.open(gpu_bundle, "trt") as pipeline:
        expected = pipeline(["a red fox", "a dog"], seed=5)
        held, _ = cuda.memory_info()
    with Pipeline.open(gpu_bundle, "trt", RuntimeOptions(low_memory=True)) as pipeline:
        frugal = pipeline(["a red fox", "a dog"], seed=5)
        assert cuda.memory_info()[0] >= held
    assert_same_pictures(frugal, expected)


@on_gpu
def test_single_graphs_between_drawings_change_nothing(gpu_bundle):
    with Pipeline.open(gpu_bundle, "trt") as pipeline:
        first = pipeline("a red fox", seed=1)
        text = pipeline.embed(["a dog"])
        kept = text.copy()
        assert_same_pictures(pipeline("a red fox", seed=1), first)
        np.testing.assert_array_equal(text, kept)


@on_gpu
def test_a_loop_on_a_gpu_agrees_with_onnx_runtime(faster_copy):
    from tiue_export.export.trt.bundle import compile_trt
    from tiue_export.export.trt.plan import TrtOptions

    bundle = compile_trt(faster_copy, TrtOptions(max_decoder_rows=4))
    with Pipeline.open(bundle, "ort", RuntimeOptions(device="cpu")) as pipeline:
        expected = pipeline(["a red fox", "a dog"], seed=5)
    for one, other in zip(drawn(bundle).pictures, expected.pictures, strict=True):
        assert psnr_db(other.latents, one.latents) >= GATES_PSNR_DB["fp32-loop"]
