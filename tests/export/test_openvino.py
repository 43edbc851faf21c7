"""OpenVINO graphs: converted, proven in the precision that runs, refused when they do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tiue_export.bundle.read import open_bundle
from tiue_export.bundle.write import add_compiled, compiled_folder
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import BundleError, ParityError, RuntimeFailure, TiueError, UsageError
from tiue_export.export.openvino import FOLDER, OpenvinoOptions, compile_openvino
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import GRAPH_NAMES, UNET_DECODER, RuntimeOptions
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.openvino_core import native_precisions, openvino_core

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
needs_bf16 = pytest.mark.skipif(
    "bf16" not in native_precisions(), reason="this CPU computes no bf16"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Compiled models of a test stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def own(compiled_bundle, tmp_path):
    """A copy to damage."""
    return open_bundle(shutil.copytree(compiled_bundle.root, tmp_path / "own"))


@pytest.fixture
def unconverted(micro_bundle, tmp_path):
    """A small bundle without this form."""
    return open_bundle(shutil.copytree(micro_bundle.root, tmp_path / "unconverted"))


def opened(bundle, **options):
    return open_runtime("openvino", bundle, RuntimeOptions(device="cpu", **options))


def test_every_graph_is_listed_with_its_files_and_proven_at_the_fp32_gate(compiled_bundle):
    compiled = compiled_bundle.manifest.compiled[FOLDER]
    assert set(compiled.graphs) == set(GRAPH_NAMES)
    assert compiled.version == openvino.__version__
    for graph, form in compiled.graphs.items():
        assert set(form.files) == {f"openvino/{graph}.xml", f"openvino/{graph}.bin"}
    assert len(compiled.parity) == 3
    assert all(r.passed and r.gate == GATES_PSNR_DB["fp32"] for r in compiled.parity)


@pytest.mark.slow
def test_fp16_weights_halve_the_files_and_are_judged_at_the_fp16_gate(unconverted):
    full = compile_openvino(unconverted)
    half = compile_openvino(full, OpenvinoOptions(weights="fp16"), force=True)

    def weights(bundle) -> int:
        return (bundle.root / FOLDER / f"{UNET_DECODER}.bin").stat().st_size

    (old,) = [r for r in full.manifest.compiled[FOLDER].graphs[UNET_DECODER].files if "bin" in r]
    before = full.manifest.compiled[FOLDER].graphs[UNET_DECODER].files[old].size_bytes
    assert 0.45 < weights(half) / before < 0.6
    assert {r.gate for r in half.manifest.compiled[FOLDER].parity} == {GATES_PSNR_DB["fp16"]}
    assert opened(half).precision in ("fp16", "bf16")


@needs_bf16
def test_bf16_is_what_auto_means_where_it_is_native_and_is_named(compiled_bundle):
    runtime = opened(compiled_bundle)
    assert (runtime.device, runtime.precision) == ("cpu bf16", "bf16")
    records = measure_runtime(compiled_bundle, runtime, load_reference(compiled_bundle))
    assert all(r.passed and r.gate == GATES_PSNR_DB["bf16"] for r in records)
    assert max(r.value for r in records) < GATES_PSNR_DB["fp32"]


@needs_bf16
def test_precisions_really_differ_and_fp32_is_never_left_to_a_default(compiled_bundle):
    reference = dict(load_reference(compiled_bundle).arrays)
    spec = compiled_bundle.spec("text_encoder")
    exact, coarse = (
        opened(compiled_bundle, precision=p).run("text_encoder", spec.select(reference))
        for p in ("fp32", "bf16")
    )
    name = spec.outputs[0].name
    assert psnr_db(reference["encoder_hidden_states"], exact[name]) >= GATES_PSNR_DB["fp32"]
    assert psnr_db(exact[name], coarse[name]) < GATES_PSNR_DB["fp32"]


def test_it_draws_the_picture_that_onnx_runtime_draws(compiled_bundle):
    options = {"ort": RuntimeOptions(), "openvino": RuntimeOptions(precision="fp32")}
    pictures = []
    for name, chosen in options.items():
        with Pipeline.open(compiled_bundle, name, chosen) as pipeline:
            pictures.append(np.asarray(pipeline("a red fox", seed=3).images[0], np.float32))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_what_was_kept_draws_the_same_bits_and_a_flipped_one_is_made_again(compiled_bundle):
    # In fp32: in bf16 one pipeline of this small model draws different last bits from run to run.
    exact = RuntimeOptions(precision="fp32")

    def drawn() -> bytes:
        with Pipeline.open(compiled_bundle, "openvino", exact) as pipeline:
            return pipeline("a red fox", seed=3).images[0].tobytes()

    first = drawn()
    blobs = sorted((user_cache_folder() / FOLDER).glob("*/*.blob"))
    assert len(blobs) == len(GRAPH_NAMES)
    written = [blob.stat().st_mtime_ns for blob in blobs]
    assert drawn() == first
    assert [blob.stat().st_mtime_ns for blob in blobs] == written
    blobs[1].chmod(0o644)
    content = bytearray(blobs[1].read_bytes())
    content[len(content) // 2] ^= 4
    blobs[1].write_bytes(content)
    assert drawn() == first
    again = sorted((user_cache_folder() / FOLDER).glob("*/*.blob"))
    assert [path.read_bytes() == bytes(content) for path in again] == [False] * len(blobs)


def test_low_memory_changes_no_result(compiled_bundle):
    reference = dict(load_reference(compiled_bundle).arrays)
    spec = compiled_bundle.spec("text_encoder")
    kept, freed = (
        opened(compiled_bundle, precision="fp32", low_memory=low).run(
            "text_encoder", spec.select(reference)
        )
        for low in (False, True)
    )
    for name, array in kept.items():
        np.testing.assert_array_equal(array, freed[name])


def test_a_bundle_without_openvino_graphs_says_how_to_make_them(tiny_bundle):
    with pytest.raises(BundleError) as caught:
        opened(tiny_bundle)
    assert caught.value.message == f"{tiny_bundle.root} has no OpenVINO graphs"
    assert caught.value.next_step == (
        f"Make them: tiue-export openvino --bundle {tiny_bundle.root}"
    )


def test_a_second_conversion_needs_force(compiled_bundle):
    with pytest.raises(BundleError, match="has OpenVINO graphs already") as caught:
        compile_openvino(compiled_bundle)
    assert caught.value.next_step == "Pass --force to make them again."


def test_unknown_weights_and_precisions_are_refused_by_name(tiny_bundle, compiled_bundle):
    with pytest.raises(UsageError, match="unknown weights 'fp8'; there are: fp16, fp32"):
        compile_openvino(tiny_bundle, OpenvinoOptions(weights="fp8"))
    with pytest.raises(UsageError, match="unknown precision 'int8'"):
        opened(compiled_bundle, precision="int8")


@pytest.mark.parametrize("device", ["gpu", "npu", "GPU.1"])
def test_a_device_that_is_not_there_is_named_beside_what_there_is(compiled_bundle, device):
    if device.upper().partition(".")[0] in openvino_core().available_devices:
        pytest.skip(f"this machine has {device}")
    with pytest.raises(RuntimeFailure, match=f"finds no {device.upper()} here; it finds CPU"):
        open_runtime("openvino", compiled_bundle, RuntimeOptions(device=device))


def test_a_graph_that_openvino_cannot_read_is_named(own):
    (own.root / FOLDER / f"{UNET_DECODER}.xml").write_text("<net/>")
    runtime = opened(own)
    with pytest.raises(RuntimeFailure, match="cannot compile unet_decoder for CPU"):
        runtime.run(UNET_DECODER, {})


def test_a_failed_gate_leaves_the_bundle_as_it_was(unconverted, monkeypatch):
    from tiue_export.proof import gates as compare

    monkeypatch.setitem(compare.GATES_PSNR_DB, "fp32", 999.0)
    with pytest.raises(ParityError):
        compile_openvino(unconverted)
    assert not (unconverted.root / FOLDER).exists()
    assert open_bundle(unconverted.root).manifest.compiled == {}
    kept = compile_openvino(unconverted, allow_parity_loss=True)
    assert not any(r.passed for r in kept.manifest.compiled[FOLDER].parity)


def test_replacing_a_compiled_form_that_breaks_half_way_leaves_a_bundle_that_opens(own):
    old = own.manifest.compiled[FOLDER]
    with compiled_folder(own, FOLDER) as folder:
        shutil.rmtree(folder)  # the new form is lost just before it is put in place
        with pytest.raises(OSError):
            add_compiled(own, FOLDER, folder, old)
    assert open_bundle(own.root).manifest.compiled == {}
    assert [p.name for p in Path(own.root).iterdir() if p.name.startswith(".")] == []


def test_the_command_converts_a_checkpoint_in_one_go_and_prints_json(run, micro_folder, tmp_path):
    code, out, _ = run("openvino", "--ckpt", micro_folder, "--out", "fox", "--json")
    assert (code, json.loads(out)["backend"]) == (0, "openvino")
    assert set(open_bundle(tmp_path / "fox").manifest.compiled) == {FOLDER}


@pytest.mark.parametrize("arguments", [[], ["--ckpt", "a", "--bundle", "b"]])
def test_a_checkpoint_or_a_bundle_is_asked_for_and_only_one(arguments, run):
    code, _, err = run("openvino", *arguments)
    assert code == UsageError.exit_code
    assert "give a checkpoint or a bundle, one of them" in err


def test_the_runtime_refuses_to_run_when_closed(compiled_bundle):
    runtime = opened(compiled_bundle)
    runtime.close()
    with pytest.raises(TiueError, match="the openvino runtime is closed"):
        runtime.run("text_encoder", {})


def test_ctrl_c_after_two_runtimes_were_closed_is_an_interrupt_not_a_crash(compiled_bundle):
    # Two cores freed in the order they were made left a signal stack that was unmapped.
    script = f"""
import gc, os, signal
from tiue_export.bundle.read import open_bundle
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import RuntimeOptions
bundle = open_bundle({str(compiled_bundle.root)!r})
first = open_runtime("openvino", bundle, RuntimeOptions(device="cpu"))
second = open_runtime("openvino", bundle, RuntimeOptions(device="cpu"))
for runtime in (first, second):
    runtime.close()
signal.signal(signal.SIGINT, signal.default_int_handler)
del first, second, runtime
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
