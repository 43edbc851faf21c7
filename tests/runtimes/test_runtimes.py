"""What every runtime owes: right shapes, untouched feeds, its own memory, and clear refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tiue_export.bundle.read import Bundle
from tiue_export.errors import CheckpointError, RuntimeFailure, TiueError, UsageError
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference
from tiue_export.registry.backends import BACKENDS, open_runtime
from tiue_export.specs import (
    GRAPH_NAMES,
    UNET_DECODER,
    UNET_ENCODER,
    RuntimeOptions,
    check_finite,
)
from tiue_export.system.install import install_line

# Those that need other hardware, or minutes in an emulator, are held to the same in tests of
# their own.
ELSEWHERE = ("qnn", "trt")
HERE = tuple(sorted(set(BACKENDS) - set(ELSEWHERE)))
COMPUTING = ("coreai", "coreml", "openvino", "ort", "torch")
PAIRS = [(name, graph) for name in HERE for graph in GRAPH_NAMES]


@pytest.fixture(scope="session")
def compiled_bundle(coreai_bundle):
    """Here, with Apple's packages and assets, which take long to make."""
    return coreai_bundle


@pytest.fixture(scope="module")
def options(tiny_pipeline) -> RuntimeOptions:
    return RuntimeOptions(device="cpu", checkpoint=str(tiny_pipeline))


def open_exact(name, bundle, options):
    """Runtimes that can choose their precision run in fp32, as the others do on this bundle."""
    if BACKENDS[name].chooses_precision:
        options = replace(options, precision="fp32")
    return open_runtime(name, bundle, options)


@pytest.fixture(scope="module")
def runtimes(compiled_bundle, options):
    opened = {name: open_exact(name, compiled_bundle, options) for name in HERE}
    yield opened
    for runtime in opened.values():
        runtime.close()


@pytest.fixture(scope="module")
def pool(compiled_bundle, runtimes):
    """The captured reference and the encoder's features: the inputs of every graph, by name."""
    captured = dict(load_reference(compiled_bundle).arrays)
    feeds = compiled_bundle.spec(UNET_ENCODER).select(captured)
    return {**captured, **runtimes["torch"].run(UNET_ENCODER, feeds)}


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("name", HERE)
def test_a_runtime_says_its_name_and_its_device(runtimes, name):
    assert runtimes[name].name == name
    known = {
        "coreai": "interpreter fp32",
        "coreml": "evaluator fp32",
        "openvino": "cpu fp32",
    }
    assert runtimes[name].device == known.get(name, "cpu")
    assert runtimes[name].precision == "fp32"


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_outputs_are_finite_and_fit_the_spec(compiled_bundle, runtimes, pool, name, graph):
    spec = compiled_bundle.spec(graph)
    outputs = runtimes[name].run(graph, spec.select(pool))
    assert list(outputs) == [tensor.name for tensor in spec.outputs]
    for tensor in spec.outputs:
        tensor.check(graph, outputs[tensor.name])
    check_finite(graph, outputs)


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_feeds_are_left_as_they_were(compiled_bundle, runtimes, pool, name, graph):
    feeds = copies(compiled_bundle.spec(graph).select(pool))
    before = copies(feeds)
    for array in feeds.values():
        array.setflags(write=False)
    runtimes[name].run(graph, feeds)
    assert_equal(feeds, before)


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_equal_feeds_give_equal_outputs_in_memory_of_their_own(
    compiled_bundle, runtimes, pool, name, graph
):
    feeds = compiled_bundle.spec(graph).select(pool)
    first = runtimes[name].run(graph, feeds)
    kept = copies(first)
    second = runtimes[name].run(graph, feeds)
    assert_equal(second, kept)
    for one in first.values():
        assert not any(np.shares_memory(one, other) for other in second.values())
        assert not any(np.shares_memory(one, feed) for feed in feeds.values())
        one.fill(7)
    assert_equal(second, kept)
    assert_equal(runtimes[name].run(graph, feeds), kept)


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_other_feeds_give_other_outputs(compiled_bundle, runtimes, pool, name, graph):
    feeds = copies(compiled_bundle.spec(graph).select(pool))
    before = runtimes[name].run(graph, feeds)
    for array in feeds.values():
        array[:] = array[:, ::-1]
    after = runtimes[name].run(graph, feeds)
    for output in before:
        assert not np.array_equal(before[output], after[output]), output


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_feeds_are_matched_by_name_not_by_order(compiled_bundle, runtimes, pool, name, graph):
    feeds = compiled_bundle.spec(graph).select(pool)
    expected = runtimes[name].run(graph, feeds)
    assert_equal(runtimes[name].run(graph, dict(reversed(feeds.items()))), expected)


@pytest.mark.parametrize(("name", "graph"), PAIRS)
def test_feeds_may_be_strided_views(compiled_bundle, runtimes, pool, name, graph):
    feeds = compiled_bundle.spec(graph).select(pool)
    views = {key: np.asfortranarray(array) for key, array in feeds.items()}
    assert_equal(runtimes[name].run(graph, views), runtimes[name].run(graph, feeds))


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_all_runtimes_agree_with_torch_on_every_output(compiled_bundle, runtimes, pool, graph):
    feeds = compiled_bundle.spec(graph).select(pool)
    truth = runtimes["torch"].run(graph, feeds)
    for name in COMPUTING:
        value = runtimes[name].run(graph, feeds)
        for output in truth:
            assert psnr_db(truth[output], value[output]) >= GATES_PSNR_DB["fp32"], (name, output)


@pytest.mark.parametrize("name", COMPUTING)
def test_the_stored_reference_is_reproduced(compiled_bundle, runtimes, pool, name):
    for graph, output, stored in (
        ("text_encoder", "last_hidden_state", "encoder_hidden_states"),
        ("unet_decoder", "latents", "latents"),
        ("vae_decoder", "sample", "picture"),
    ):
        outputs = runtimes[name].run(graph, compiled_bundle.spec(graph).select(pool))
        assert psnr_db(pool[stored], outputs[output]) >= GATES_PSNR_DB["fp32"], stored


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_low_memory_change_no_result(
    compiled_bundle, runtimes, pool, options, threads, low_memory
):
    feeds = compiled_bundle.spec(UNET_DECODER).select(pool)
    runtime = open_runtime(
        "ort", compiled_bundle, replace(options, threads=threads, low_memory=low_memory)
    )
    expected = runtimes["ort"].run(UNET_DECODER, feeds)["latents"]
    assert psnr_db(expected, runtime.run(UNET_DECODER, feeds)["latents"]) >= 120
    runtime.close()


@pytest.mark.parametrize("name", HERE)
def test_a_runtime_may_be_closed_used_or_unused_and_twice(compiled_bundle, pool, options, name):
    feeds = compiled_bundle.spec(UNET_ENCODER).select(pool)
    unused = open_exact(name, compiled_bundle, options)
    unused.close()
    runtime = open_exact(name, compiled_bundle, options)
    outputs = runtime.run(UNET_ENCODER, feeds)
    kept = copies(outputs)
    runtime.close()
    runtime.close()
    assert_equal(outputs, kept)


def test_closing_one_runtime_leaves_another_of_the_same_bundle_open(
    compiled_bundle, runtimes, pool, options
):
    feeds = compiled_bundle.spec(UNET_ENCODER).select(pool)
    for name in HERE:
        other = open_exact(name, compiled_bundle, options)
        expected = other.run(UNET_ENCODER, feeds)
        other.close()
        assert_equal(runtimes[name].run(UNET_ENCODER, feeds), expected)


@pytest.mark.parametrize(("got", "meant"), [("orrt", "ort"), ("tourch", "torch"), ("FAKE", None)])
def test_an_unknown_runtime_is_refused_with_the_nearest_name(compiled_bundle, got, meant):
    with pytest.raises(UsageError) as caught:
        open_runtime(got, compiled_bundle, RuntimeOptions())
    assert (
        caught.value.message == f"unknown runtime {got!r}; there are: {', '.join(sorted(BACKENDS))}"
    )
    assert caught.value.next_step == (f"Did you mean {meant!r}?" if meant else None)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64"])
def test_a_feed_of_the_wrong_dtype_is_refused_naming_both(compiled_bundle, pool, dtype):
    feeds = {**pool, "sample": pool["sample"].astype(dtype)}
    with pytest.raises(RuntimeFailure) as caught:
        compiled_bundle.spec(UNET_ENCODER).select(feeds)
    assert caught.value.message == (
        f'unet_encoder: input "sample" is {dtype}; the bundle expects float32'
    )
    assert caught.value.next_step == "Convert it with array.astype('float32')."


@pytest.mark.parametrize(
    "shape", [(4, 8, 8), (1, 4, 8, 16), (2, 4, 8, 8), (1, 8, 8, 4), (1, 1, 4, 8, 8), ()]
)
def test_a_feed_of_the_wrong_shape_is_refused_naming_both(compiled_bundle, pool, shape):
    feeds = {**pool, "sample": np.zeros(shape, np.float32)}
    with pytest.raises(RuntimeFailure) as caught:
        compiled_bundle.spec(UNET_ENCODER).select(feeds)
    written = "(" + ", ".join(map(str, shape)) + ")"
    assert caught.value.message == (
        f'unet_encoder: input "sample" has shape {written}; the bundle expects (1, 4, 8, 8)'
    )
    assert "--height/--width/--batch" in caught.value.next_step


def test_a_missing_feed_is_named_beside_what_there_was(compiled_bundle, pool):
    feeds = {"sample": pool["sample"], "other": pool["sample"]}
    with pytest.raises(RuntimeFailure) as caught:
        compiled_bundle.spec(UNET_ENCODER).select(feeds)
    assert caught.value.message == (
        "unet_encoder: no value for input encoder_hidden_states; got sample, other"
    )


def test_a_dynamic_axis_takes_any_size_and_the_others_do_not(compiled_bundle):
    spec = replace(compiled_bundle.spec(UNET_ENCODER).inputs[0], shape=("batch", 4, 8, 8))
    for batch in (1, 3):
        spec.check("unet_encoder", np.zeros((batch, 4, 8, 8), np.float32))
    with pytest.raises(RuntimeFailure, match=r"the bundle expects \(batch, 4, 8, 8\)"):
        spec.check("unet_encoder", np.zeros((1, 4, 8, 9), np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_outputs_are_counted_and_named(bad):
    outputs = {"fine": np.ones(3), "ids": np.ones(3, int), "latents": np.array([1, bad, bad])}
    with pytest.raises(RuntimeFailure) as caught:
        check_finite("unet_decoder", outputs)
    assert caught.value.message == ('unet_decoder: output "latents" holds 2 non-finite values of 3')


@pytest.mark.parametrize("name", COMPUTING)
@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused(compiled_bundle, options, name, threads):
    with pytest.raises(UsageError) as caught:
        open_runtime(name, compiled_bundle, replace(options, threads=threads))
    assert caught.value.message == f"--threads is {threads}; expected 1 or more"


@pytest.mark.parametrize("name", COMPUTING)
def test_an_unknown_device_is_refused_by_name(compiled_bundle, options, name):
    with pytest.raises(UsageError, match="unknown device 'cuba'") as caught:
        open_runtime(name, compiled_bundle, replace(options, device="cuba"))
    # OpenVINO, Core ML and Core AI have no CUDA device to mean.
    meant = {"coreai": None, "coreml": None, "openvino": None}.get(name, "Did you mean 'cuda'?")
    assert caught.value.next_step == meant


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_a_precision_is_refused_where_the_runtime_cannot_choose(compiled_bundle, options, name):
    with pytest.raises(UsageError) as caught:
        open_runtime(name, compiled_bundle, replace(options, precision="bf16"))
    assert caught.value.message == (f"the {name} runtime computes in its bundle's precision, fp32")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has CUDA",
)
def test_cuda_on_a_cpu_build_of_onnx_runtime_is_refused_with_the_line_that_helps(compiled_bundle):
    with pytest.raises(RuntimeFailure) as caught:
        open_runtime("ort", compiled_bundle, RuntimeOptions(device="cuda"))
    assert caught.value.message == (
        f"this onnxruntime ({onnxruntime.__version__}) has no CUDAExecutionProvider; it has "
        f"{', '.join(onnxruntime.get_available_providers())}"
    )
    assert caught.value.next_step == f"pip uninstall onnxruntime && {install_line('gpu')}"


def test_cuda_without_a_gpu_is_refused_by_the_torch_runtime_too(compiled_bundle, options):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TiueError):
        open_runtime("torch", compiled_bundle, replace(options, device="cuda"))


def test_the_torch_runtime_without_a_checkpoint_says_which_one_to_give(compiled_bundle):
    with pytest.raises(UsageError) as caught:
        open_runtime("torch", compiled_bundle, RuntimeOptions())
    assert caught.value.message == (
        "the torch runtime runs the student itself and needs its checkpoint"
    )
    assert caught.value.next_step == (
        "generate and parity take it: --ckpt CHECKPOINT, which is pipeline (with --base as at the "
        "export)."
    )


def test_the_torch_runtime_refuses_another_checkpoint_by_its_hash(compiled_bundle, tmp_path):
    from tiue_export.benchmarks.synthetic import write_synthetic_pipeline

    other = write_synthetic_pipeline(tmp_path / "other", "tiny", seed=1)
    with pytest.raises(CheckpointError) as caught:
        open_runtime("torch", compiled_bundle, RuntimeOptions(checkpoint=str(other)))
    known = compiled_bundle.manifest.source.sha256
    start, _, rest = caught.value.message.partition(": the SHA-256 of its unet is ")
    assert start == f"{other} is not the student of this bundle"
    assert rest.endswith(f"..., the bundle's {known[:12]}...")
    assert not rest.startswith(known[:12])
    assert "pipeline" in caught.value.next_step


def test_the_torch_runtime_takes_the_same_student_from_another_place(
    compiled_bundle, tiny_pipeline, runtimes, pool, tmp_path
):
    moved = Path(shutil.copytree(tiny_pipeline, tmp_path / "moved"))
    runtime = open_runtime("torch", compiled_bundle, RuntimeOptions(checkpoint=str(moved)))
    feeds = compiled_bundle.spec(UNET_DECODER).select(pool)
    assert_equal(runtime.run(UNET_DECODER, feeds), runtimes["torch"].run(UNET_DECODER, feeds))


def test_a_graph_that_onnx_runtime_cannot_load_is_named(compiled_bundle, bundle_copy, pool):
    broken = Bundle(bundle_copy, compiled_bundle.manifest)
    broken.graph_path(UNET_ENCODER).write_bytes(b"not onnx")
    runtime = open_runtime("ort", broken, RuntimeOptions(device="cpu"))
    with pytest.raises(RuntimeFailure) as caught:
        runtime.run(UNET_ENCODER, broken.spec(UNET_ENCODER).select(pool))
    assert caught.value.message.startswith(
        f"ONNX Runtime {onnxruntime.__version__} cannot load unet_encoder: "
    )
    assert "\n" not in caught.value.message


def test_a_run_that_onnx_runtime_rejects_is_named(runtimes, pool):
    with pytest.raises(RuntimeFailure) as caught:
        runtimes["ort"].run(UNET_ENCODER, {"sample": pool["sample"][:, :3]})
    assert caught.value.message.startswith("ONNX Runtime failed in unet_encoder: ")
    assert "\n" not in caught.value.message
