"""ONNX Runtime with its tensors bound to a device: the same code on the CPU, and every refusal."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from tiue_export import Pipeline
from tiue_export.bundle.chain import NOISE, TOKENS
from tiue_export.errors import MissingExtraError, RuntimeFailure, UsageError
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes.ort.chain import OrtChain
from tiue_export.runtimes.ort.rtx import PROVIDER, registered_devices
from tiue_export.runtimes.ort.runtime import choose_provider
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import GRAPH_NAMES, UNET_ENCODER, RuntimeOptions

HAS_CUDA = "CUDAExecutionProvider" in ort.get_available_providers()
CPU = RuntimeOptions(device="cpu", threads=1)


@pytest.fixture(scope="module")
def sessions(tiny_bundle):
    """One session per graph, exact and on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        graph: ort.InferenceSession(
            tiny_bundle.graph_path(graph), options, ["CPUExecutionProvider"]
        )
        for graph in GRAPH_NAMES
    }


@pytest.fixture(scope="module")
def chain(tiny_bundle, sessions):
    return OrtChain(tiny_bundle, 1, "cpu", sessions.__getitem__)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.open(tiny_bundle, "ort", CPU) as pipeline:
        yield pipeline


def request(pipeline, prompt, seed):
    return {TOKENS: pipeline.tokenizer([prompt]), NOISE: noise_from_seed(seed, (1, 4, 8, 8))}


def test_a_chain_gives_what_the_graphs_one_by_one_give(chain, pipeline):
    for prompt, seed in (("a red fox", 3), ("an astronaut", 4)):
        drawn = chain.run_chain(request(pipeline, prompt, seed))
        text = pipeline.embed([prompt])
        latents = pipeline.latents_from_noise(noise_from_seed(seed, (1, 4, 8, 8)), text)
        np.testing.assert_array_equal(drawn.latents, latents)
        np.testing.assert_array_equal(drawn.picture, pipeline.decode(latents))
        assert list(drawn.stage_latency_ms) == list(GRAPH_NAMES)


def test_the_results_of_a_chain_belong_to_the_caller(chain, pipeline):
    feeds = request(pipeline, "a red fox", 3)
    first = chain.run_chain(feeds)
    latents, picture = first.latents.copy(), first.picture.copy()
    chain.run_chain(request(pipeline, "another", 9))
    np.testing.assert_array_equal(first.latents, latents)
    np.testing.assert_array_equal(first.picture, picture)
    first.latents.fill(7)
    np.testing.assert_array_equal(chain.run_chain(feeds).latents, latents)


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_a_bound_graph_gives_what_an_unbound_one_gives(tiny_bundle, chain, sessions, graph):
    known = dict(load_reference(tiny_bundle).arrays)
    encoder = tiny_bundle.spec(UNET_ENCODER)
    pool = {**known, **chain.run_graph(UNET_ENCODER, encoder.select(known))}
    feeds = tiny_bundle.spec(graph).select(pool)
    bound = chain.run_graph(graph, feeds)
    for name, value in zip(bound, sessions[graph].run(list(bound), feeds), strict=True):
        np.testing.assert_array_equal(bound[name], value)


def test_a_non_finite_result_names_the_graph_that_began_it(chain, pipeline):
    feeds = request(pipeline, "a red fox", 3)
    feeds[NOISE] = np.full_like(feeds[NOISE], np.nan)
    with pytest.raises(RuntimeFailure, match=r'^unet_encoder: output "mid_sample" holds \d+ non-f'):
        chain.run_chain(feeds)


def test_on_the_cpu_there_is_nothing_to_chain(tiny_bundle):
    runtime = open_runtime("ort", tiny_bundle, CPU)
    assert (
        runtime.run_chain(np.zeros((1, 77), np.int64), np.zeros((1, 4, 8, 8), np.float32)) is None
    )
    runtime.close()


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_a_device_that_onnx_runtime_lacks_is_named(tiny_bundle, sessions):
    with pytest.raises(RuntimeFailure, match=r"^ONNX Runtime cannot hold a tensor .* on cuda: "):
        OrtChain(tiny_bundle, 1, "cuda", sessions.__getitem__)


@pytest.mark.parametrize(
    ("device", "provider", "has_cuda", "chosen"),
    [
        ("auto", None, False, "cpu"),
        ("auto", None, True, "cuda"),
        ("cpu", None, True, "cpu"),
        ("cuda", None, False, "cuda"),
        ("auto", "cpu", True, "cpu"),
        ("auto", "rtx", False, "rtx"),
        ("cuda", "rtx", True, "rtx"),
    ],
)
def test_the_provider_follows_from_what_was_asked_and_what_there_is(
    device, provider, has_cuda, chosen
):
    available = ["CUDAExecutionProvider"] * has_cuda + ["CPUExecutionProvider"]
    options = RuntimeOptions(device=device, provider=provider)
    assert choose_provider(options, available) == chosen


@pytest.mark.parametrize(
    ("device", "provider", "message"),
    [
        ("cpu", "rtx", "--device cpu and --provider rtx contradict each other"),
        ("cuda", "cpu", "--device cuda and --provider cpu contradict each other"),
        ("auto", "rtxx", "unknown provider 'rtxx'; there are: cpu, cuda, rtx"),
        ("rtx", None, "unknown device 'rtx'; there are: cpu, cuda"),
    ],
)
def test_a_provider_that_cannot_be_is_refused(device, provider, message):
    with pytest.raises(UsageError) as caught:
        choose_provider(RuntimeOptions(device=device, provider=provider), [])
    assert caught.value.message == message


def test_a_cuda_graph_on_the_cpu_is_refused(tiny_bundle):
    with pytest.raises(UsageError) as caught:
        open_runtime("ort", tiny_bundle, replace(CPU, cuda_graph=True))
    assert caught.value.message == "--cuda-graph needs an NVIDIA GPU; this runs on the CPU"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trt", {"provider": "rtx"}, "the trt runtime takes no --provider"),
        ("torch", {"cuda_graph": True}, "the torch runtime takes no --cuda-graph"),
    ],
)
def test_an_option_of_another_runtime_is_refused(tiny_bundle, name, options, message):
    with pytest.raises(UsageError) as caught:
        open_runtime(name, tiny_bundle, RuntimeOptions(**options))
    assert caught.value.message == message


@pytest.fixture
def dropped_cuda(monkeypatch):
    """An onnxruntime whose CUDA provider is listed and dropped when a session asks for it."""
    real = ort.InferenceSession
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, providers: real(path, options, listed[1:])
    )


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (RuntimeOptions(provider="cuda"), "or use --provider cpu."),
        (RuntimeOptions(device="cuda"), "or use --device cpu."),
        (RuntimeOptions(device="cuda", provider="cuda"), "or use --provider cpu."),
    ],
)
def test_cuda_that_was_asked_for_and_does_not_start_is_an_error_and_never_the_cpu(
    tiny_bundle, dropped_cuda, options, remedy
):
    opened = Pipeline.open(tiny_bundle, "ort", options)
    with opened, pytest.raises(RuntimeFailure) as caught:
        opened("a red fox")
    assert caught.value.message == (
        "ONNX Runtime could not start CUDAExecutionProvider; it offers CPUExecutionProvider"
    )
    assert caught.value.next_step.endswith(remedy)


def test_cuda_that_was_only_hoped_for_gives_way_to_the_cpu_with_a_warning(
    tiny_bundle, dropped_cuda
):
    with Pipeline.open(tiny_bundle, "ort", RuntimeOptions(threads=1)) as opened:
        with pytest.warns(UserWarning, match="could not start CUDAExecutionProvider: running on"):
            opened("a red fox")
        assert opened.runtime.device == "cpu"


def test_generate_with_a_cuda_provider_that_does_not_start_fails_and_draws_nothing(
    run, tiny_bundle, tmp_path, dropped_cuda
):
    code, _, err = run("generate", tiny_bundle.root, "fox", "--provider", "cuda", "--out", "p")
    assert code == RuntimeFailure.exit_code
    assert "could not start CUDAExecutionProvider" in err
    assert not (tmp_path / "p").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is not None,
    reason="the plug-in is installed",
)
def test_the_rtx_provider_without_its_plug_in_says_what_to_install(tiny_bundle):
    with pytest.raises(MissingExtraError) as caught:
        open_runtime("ort", tiny_bundle, RuntimeOptions(provider="rtx"))
    assert caught.value.message == (
        "--provider rtx needs onnxruntime-ep-nv-tensorrt-rtx, which is not installed"
    )
    assert "pip install 'onnxruntime>=1.24' onnxruntime-ep-nv" in caught.value.next_step


def test_a_plug_in_that_does_not_load_is_explained(tmp_path):
    library = tmp_path / "libprovider.so"
    library.write_bytes(b"no library")
    with pytest.raises(RuntimeFailure) as caught:
        registered_devices(PROVIDER, str(library))
    assert caught.value.message.startswith(f"ONNX Runtime cannot load {PROVIDER}: ")
    assert "\n" not in caught.value.message
    assert "nvidia-smi" in caught.value.next_step


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="this onnxruntime has no CUDA")
@pytest.mark.parametrize("cuda_graph", [None, True])
def test_tensors_kept_on_the_gpu_give_the_picture_of_the_cpu(tiny_bundle, pipeline, cuda_graph):
    expected = pipeline(["a red fox", "a dog"], seed=5)
    options = RuntimeOptions(device="cuda", cuda_graph=cuda_graph)
    with Pipeline.open(tiny_bundle, "ort", options) as on_gpu:
        for _ in range(2):  # the second is a replay
            drawn = on_gpu(["a red fox", "a dog"], seed=5)
        for one, other in zip(drawn.pictures, expected.pictures, strict=True):
            assert psnr_db(other.latents, one.latents) >= GATES_PSNR_DB["fp32"]
