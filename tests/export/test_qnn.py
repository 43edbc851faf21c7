"""Snapdragon: contexts really compiled by Qualcomm's compiler, and run in its emulator."""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tiue_export import Pipeline, export_onnx, load_student, open_bundle
from tiue_export.bundle.archive import pack_bundle, unpack_bundle
from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    BundleError,
    ResourceError,
    RuntimeFailure,
    TiueWarning,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.export.qnn.bundle import compile_qnn
from tiue_export.export.qnn.child import COMPILE, QUANTIZE, ask, failure_of
from tiue_export.export.qnn.compile_process import CompileRequest
from tiue_export.export.qnn.options import NOTHING, QnnOptions
from tiue_export.export.qnn.time_table import put_time_table
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.conditioning import SUBJECT, empty_prompt, measure_conditioning
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes.qnn_emulator import Emulator
from tiue_export.specs import (
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    Runtime,
    RuntimeOptions,
)
from tiue_export.system.snapdragon import soc_in, socs_named

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
EMULATOR = RuntimeOptions(device="emulator")


@pytest.fixture(scope="session")
def snapdragon_bundle(micro_pipeline, made_once) -> Bundle:
    """A student of all parts in one pass, with contexts for HTP v75. Shared."""

    def make(folder: Path) -> None:
        export_onnx(load_student(micro_pipeline), folder)
        compile_qnn(open_bundle(folder))

    return open_bundle(made_once("snapdragon", make))


@pytest.fixture(scope="module")
def emulator(snapdragon_bundle) -> Iterator[Runtime]:
    runtime = open_runtime("qnn", snapdragon_bundle, EMULATOR)
    yield runtime
    runtime.close()


def retold(bundle: Bundle, **changes: object) -> Bundle:
    """The bundle as if its form said something else."""
    form = replace(bundle.manifest.compiled["qnn-v75"], **changes)
    return Bundle(bundle.root, replace(bundle.manifest, compiled={"qnn-v75": form}))


# What is made


def test_every_graph_has_a_context_that_the_emulator_proves(snapdragon_bundle):
    form = snapdragon_bundle.manifest.compiled["qnn-v75"]
    assert form.target == {"htp": "v75", "soc": "sm8650", "soc_model": "57"}
    assert set(form.graphs) == set(snapdragon_bundle.manifest.graphs)
    for name, graph in form.graphs.items():
        assert list(graph.files) == [f"qnn-v75/{name}.onnx", f"qnn-v75/{name}_qnn.bin"]
        assert graph.report["compile_s"] > 0
        assert graph.report["peak_memory_bytes"] > 1e7
    subjects = {record.subject for record in form.parity}
    assert subjects == {"encoder_hidden_states", "latents", "picture", SUBJECT}
    for record in form.parity:
        assert record.passed
        assert record.hop == "qnn emulator v75"
        assert 25 < record.value < 100, "half precision, and not the ONNX graph itself"


def test_a_context_is_one_node_that_no_cpu_kernel_runs(snapdragon_bundle):
    for graph in snapdragon_bundle.manifest.compiled["qnn-v75"].graphs.values():
        model = onnx.load(snapdragon_bundle.root / graph.path)
        assert [node.op_type for node in model.graph.node] == ["EPContext"]


def test_the_command_makes_a_form_for_each_chip_and_says_where_it_runs(
    run, snapdragon_bundle, tmp_path
):
    root = tmp_path / "b"
    shutil.copytree(snapdragon_bundle.root, root)
    code, out, _ = run("qnn", "--bundle", root, "--htp", "75", "--soc", "x-elite", "--dry-run")
    assert code == 0
    assert "Snapdragon X Elite" in out
    assert "Snapdragon 8 Gen 3 (HTP v75)" in out
    code, out, _ = run("qnn", "--bundle", root, "--htp", "75", "--htp", "79", "--dry-run", "--json")
    forms = json.loads(out)["forms"]
    assert [(form["form"], form["exists"]) for form in forms] == [
        ("qnn-v75", True),
        ("qnn-v79", False),
    ]
    code, _, err = run("qnn", "--bundle", root)
    assert code == 6
    assert "has contexts for HTP v75 already" in err
    code, out, _ = run("qnn", "--bundle", root, "--soc", "x-elite", "--optimization", "2", "--json")
    assert code == 0
    (folder,) = json.loads(out)["forms"]
    assert folder == "qnn-v73"
    bundle = open_bundle(root)
    assert set(bundle.manifest.compiled) == {"qnn-v73", "qnn-v75"}
    assert bundle.manifest.compiled["qnn-v73"].flags["optimization"] == 2
    # Both go to a device together, without the ONNX graphs, and draw there.
    pack_bundle(bundle, tmp_path / "b.tar", runtime="qnn")
    carried = unpack_bundle(tmp_path / "b.tar", tmp_path / "there")
    assert set(carried.manifest.compiled) == {"qnn-v73", "qnn-v75"}
    assert not carried.manifest.has_onnx
    runtime = open_runtime("qnn", carried, RuntimeOptions(device="v73"))
    assert runtime.device == "emulator v73"
    records = measure_runtime(carried, runtime, load_reference(carried))
    runtime.close()
    assert [record.subject for record in records] == ["encoder_hidden_states", "latents", "picture"]
    assert all(record.passed for record in records)


def test_contexts_that_were_finished_when_a_later_one_failed_are_kept_and_the_rest_is_made(
    run, micro_bundle, tmp_path, monkeypatch
):
    root = Path(shutil.copytree(micro_bundle.root, tmp_path / "b"))
    asked: list[str] = []

    def failing(bundle: Bundle, graph: str, module: str, request: object) -> dict[str, object]:
        asked.append(graph)
        if graph == UNET_DECODER:
            Path(request.context).write_bytes(b"half of it")  # type: ignore[attr-defined]
            raise ResourceError(f"{graph}: memory ran out", "Free memory.")
        return ask(bundle, graph, module, request)

    monkeypatch.setattr("tiue_export.export.qnn.bundle.ask", failing)
    code, _, err = run("qnn", "--bundle", root)
    assert code == ResourceError.exit_code
    assert "memory ran out" in err
    kept = asked[:-1]
    note = f"unet_encoder is finished and kept: the same options with --bundle {root} make the rest"
    assert note in " ".join(err.split())
    unfinished = open_bundle(root)
    form = unfinished.manifest.compiled["qnn-v75"]
    assert list(form.graphs) == kept
    assert {path.name for path in (root / "qnn-v75").iterdir()} == {
        Path(file).name for graph in form.graphs.values() for file in graph.files
    }
    # Nothing draws with it, nor takes it to a device, and other settings do not finish it.
    with pytest.raises(BundleError, match=r"v75 .* has none of unet_decoder") as told:
        open_runtime("qnn", unfinished, EMULATOR)
    again = ["tiue-export", "qnn", "--bundle", str(root), "--htp", "75", "--precision", "fp16"]
    assert shlex.split(told.value.next_step.partition(": ")[2]) == again
    with pytest.raises(UsageError, match="has no qnn form of unet_decoder"):
        pack_bundle(unfinished, tmp_path / "b.tar", runtime="qnn")
    with pytest.raises(BundleError, match="already"):
        compile_qnn(unfinished, QnnOptions(optimization=2))
    _, out, _ = run("qnn", "--bundle", root, "--dry-run")
    assert out.count("there; --force anew") == len(kept)
    assert out.count("to make") == len(unfinished.manifest.graphs) - len(kept)
    asked.clear()
    monkeypatch.setattr(
        "tiue_export.export.qnn.bundle.ask",
        lambda bundle, graph, *request: asked.append(graph) or ask(bundle, graph, *request),
    )
    code, _, err = run(*again[1:])
    assert code == 0, err
    assert asked == [name for name in unfinished.manifest.graphs if name not in kept]
    form = open_bundle(root).manifest.compiled["qnn-v75"]
    assert list(form.graphs) == list(unfinished.manifest.graphs)
    assert all(record.passed for record in form.parity)


def test_a_loop_with_fresh_noise_runs_on_it(few_step_bundle, tmp_path):
    bundle = compile_qnn(open_bundle(shutil.copytree(few_step_bundle.root, tmp_path / "b")))
    latents = {}
    for name, device in (("qnn", "emulator"), ("ort", "cpu")):
        with Pipeline.open(bundle, name, RuntimeOptions(device=device)) as pipeline:
            latents[name] = pipeline("a red fox", seed=3).pictures[0].latents
    assert 30 < psnr_db(latents["ort"], latents["qnn"]) < 100


@pytest.mark.parametrize("graph", UNET_GRAPHS)
def test_timesteps_are_looked_up_and_no_number_changes(few_step_bundle, graph):
    path = few_step_bundle.graph_path(graph)
    model = onnx.load(path)
    before = onnxruntime.InferenceSession(str(path))
    assert put_time_table(model, 1000) == 2
    assert not {"Sin", "Cos"} & {node.op_type for node in model.graph.node}
    after = onnxruntime.InferenceSession(model.SerializeToString())
    random = np.random.RandomState(0)
    for timestep in (999, 259, 0):
        feeds = {
            tensor.name: np.full(tensor.shape, timestep, np.float32)
            if tensor.name.startswith("timestep")
            else random.standard_normal(tensor.shape).astype(np.float32)
            for tensor in few_step_bundle.spec(graph).inputs
        }
        for exact, looked_up in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            assert psnr_db(exact, looked_up) > 120
    assert put_time_table(model, 1000) == 0


def test_a_students_rows_run_one_at_a_time_and_draw_the_same(
    micro_pipeline, snapdragon_bundle, tmp_path
):
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=1))
    bundle = compile_qnn(export_onnx(student, tmp_path / "b"))
    form = bundle.manifest.compiled["qnn-v75"]
    assert form.flags["decoder_steps"] == 1
    assert all(record.passed for record in form.parity)
    assert SUBJECT in {record.subject for record in form.parity}
    assert not list(bundle.root.glob("qnn-v75/.*")), "no copy of the graphs is left"
    latents = {}
    for name, root, runtime, device in (
        ("at once", snapdragon_bundle, "ort", "cpu"),
        ("row by row", bundle, "ort", "cpu"),
        ("on the HTP", bundle, "qnn", "emulator"),
    ):
        with Pipeline.open(root, runtime, RuntimeOptions(device=device)) as pipeline:
            latents[name] = pipeline("a red fox", seed=3).pictures[0].latents
    assert psnr_db(latents["at once"], latents["row by row"]) > 100
    assert 50 < psnr_db(latents["at once"], latents["on the HTP"]) < 100


def test_rows_that_do_not_come_out_even_fill_the_last_run_up(micro_pipeline, tmp_path):
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=3))
    bundle = compile_qnn(export_onnx(student, tmp_path / "b"), QnnOptions(prove=NOTHING))
    assert bundle.manifest.compiled["qnn-v75"].flags["decoder_steps"] == 3
    latents = {}
    for name, device in (("ort", "cpu"), ("qnn", "emulator")):
        with Pipeline.open(bundle, name, RuntimeOptions(device=device)) as pipeline:
            latents[name] = pipeline("a red fox", seed=3).pictures[0].latents
    assert 50 < psnr_db(latents["ort"], latents["qnn"]) < 100


# What it owes as a runtime


def test_feeds_are_left_alone_and_outputs_are_the_callers(snapdragon_bundle, emulator):
    known = load_reference(snapdragon_bundle).arrays
    spec = snapdragon_bundle.spec(UNET_ENCODER)
    feeds = {name: array.copy() for name, array in spec.select(known).items()}
    for array in feeds.values():
        array.setflags(write=False)
    first = emulator.run(UNET_ENCODER, feeds)
    assert list(first) == [tensor.name for tensor in spec.outputs]
    for tensor in spec.outputs:
        tensor.check(UNET_ENCODER, first[tensor.name])
    kept = {name: array.copy() for name, array in first.items()}
    second = emulator.run(UNET_ENCODER, dict(reversed(feeds.items())))
    for name, array in second.items():
        np.testing.assert_array_equal(array, kept[name])
        assert not np.shares_memory(array, first[name])
    other = emulator.run(UNET_ENCODER, {name: array[..., ::-1] for name, array in feeds.items()})
    assert any(not np.array_equal(other[name], kept[name]) for name in kept)


def test_the_emulator_says_that_it_is_one_unless_it_was_asked_for(snapdragon_bundle):
    with pytest.warns(TiueWarning, match="emulator of HTP v75 computes the same numbers"):
        open_runtime("qnn", snapdragon_bundle, RuntimeOptions()).close()
    runtime = open_runtime("qnn", snapdragon_bundle, EMULATOR)  # a warning would be an error
    assert (runtime.name, runtime.device) == ("qnn", "emulator v75")
    runtime.close()
    with pytest.raises(RuntimeFailure, match="is closed"):
        runtime.run(VAE_DECODER, {})


# Refusals


@pytest.mark.parametrize(
    ("device", "kind", "message", "next_step"),
    [
        ("npu", RuntimeFailure, "no Snapdragon NPU is here", "Use --device emulator"),
        ("v79", BundleError, "has no contexts for HTP v79; it has those of v75", "--htp 79"),
        ("gpu", UsageError, "unknown device 'gpu'", None),
    ],
)
def test_a_device_that_is_not_there_is_named(snapdragon_bundle, device, kind, message, next_step):
    with pytest.raises(kind, match=message) as caught:
        open_runtime("qnn", snapdragon_bundle, RuntimeOptions(device=device))
    assert next_step is None or next_step in caught.value.next_step


def test_a_bundle_without_contexts_is_told_how_to_make_them(micro_bundle):
    with pytest.raises(BundleError, match="has no contexts for Snapdragon") as caught:
        open_runtime("qnn", micro_bundle, EMULATOR)
    assert caught.value.next_step.startswith("Make them: tiue-export qnn --bundle ")


def test_contexts_of_a_newer_sdk_are_refused_before_they_are_opened(snapdragon_bundle):
    newer = retold(snapdragon_bundle, version="99.1.0")
    with pytest.raises(RuntimeFailure, match=r"SDK 99\.1\.0, here is the older 2") as caught:
        open_runtime("qnn", newer, EMULATOR)
    assert "tiue-export qnn --bundle" in caught.value.next_step


def test_a_damaged_context_is_refused_by_its_hash_and_by_the_emulator(snapdragon_bundle, tmp_path):
    bundle = Bundle(tmp_path / "b", snapdragon_bundle.manifest)
    shutil.copytree(snapdragon_bundle.root, bundle.root)
    binary = bundle.root / "qnn-v75" / "vae_decoder_qnn.bin"
    content = bytearray(binary.read_bytes())
    content[:4096] = bytes(4096)
    binary.write_bytes(content)
    with pytest.raises(BundleError, match=r"vae_decoder_qnn\.bin"):
        open_bundle(bundle.root)
    runtime = open_runtime("qnn", bundle, EMULATOR)
    feeds = bundle.spec(VAE_DECODER).select(load_reference(bundle).arrays)
    with pytest.raises(RuntimeFailure, match="vae_decoder"):
        runtime.run(VAE_DECODER, feeds)
    runtime.close()


def test_a_crash_of_the_emulator_has_the_graphs_name_and_the_next_run_another_process(
    snapdragon_bundle,
):
    known = load_reference(snapdragon_bundle).arrays
    feeds = snapdragon_bundle.spec(VAE_DECODER).select(known)
    context = snapdragon_bundle.root / "qnn-v75" / "vae_decoder.onnx"
    emulator = Emulator()
    emulator.run(VAE_DECODER, context, feeds)
    emulator._process.kill()
    with pytest.raises(RuntimeFailure, match=r"crashed in vae_decoder \(exit code -9\)"):
        emulator.run(VAE_DECODER, context, feeds)
    assert set(emulator.run(VAE_DECODER, context, feeds)) == {"sample"}
    emulator.close()


def onnx_file(folder: Path, operation: str) -> Path:
    """x (1, 4, 8) -> a product -> `operation` -> y."""
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8]) for name in ("x", "y")
    ]
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"], name="square"),
        helper.make_node(operation, ["square"], ["y"], name="last_one"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "g.onnx")
    return folder / "g.onnx"


def request_for(file: Path, context: Path) -> CompileRequest:
    return CompileRequest(str(file), str(context), htp="75", model=57, optimization=2)


def test_an_operation_that_would_fall_to_the_cpu_is_named(micro_bundle, tmp_path):
    request = request_for(onnx_file(tmp_path, "Hardmax"), tmp_path / "context.onnx")
    with pytest.raises(UnsupportedModelError) as caught:
        ask(micro_bundle, "unet_decoder", COMPILE, request)
    assert caught.value.message == (
        "unet_decoder has operations that the HTP does not run: Hardmax (last_one)"
    )
    assert "tiue-export openvino --bundle" in caught.value.next_step


def test_a_full_disk_is_a_full_disk(micro_bundle, tmp_path):
    (tmp_path / "context_qnn.bin").symlink_to("/dev/full")
    request = request_for(onnx_file(tmp_path, "Relu"), tmp_path / "context.onnx")
    with pytest.raises(OSError) as caught:
        ask(micro_bundle, "unet_decoder", COMPILE, request)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("answer", [(-9, ""), (1, "QNN_COMMON_ERROR_MEM_ALLOC: Memory")])
@pytest.mark.parametrize(
    ("module", "done", "way_out", "who"),
    [
        (COMPILE, "compiled", "--max-decoder-rows 1", "Qualcomm's compiler 2"),
        (QUANTIZE, "quantized", "--precision fp16", "ONNX Runtime's quantization"),
    ],
)
def test_a_child_without_memory_is_told_from_one_that_fails(
    micro_bundle, answer, module, done, way_out, who
):
    failure = failure_of(micro_bundle, "unet_decoder", module, *answer, log="")
    assert isinstance(failure, ResourceError)
    assert f"unet_decoder: memory ran out while it was {done}" in failure.message
    assert way_out in failure.next_step
    other = failure_of(micro_bundle, "unet_decoder", module, 1, "no such graph", log="")
    assert isinstance(other, RuntimeFailure)
    assert other.message.startswith(who)
    assert other.message.endswith("failed in unet_decoder: no such graph")


def test_a_search_that_cannot_be_proven_is_refused(micro_bundle):
    with pytest.raises(UsageError, match="--optimization is 1; expected 2 or 3"):
        compile_qnn(micro_bundle, QnnOptions(optimization=1))


def test_timesteps_between_the_whole_ones_are_refused_where_they_are_looked_up(few_step_bundle):
    plan = few_step_bundle.manifest.plan
    first = replace(plan.passes[0], timesteps=(0.5,))
    between = replace(plan, passes=(first, *plan.passes[1:]))
    bundle = Bundle(few_step_bundle.root, replace(few_step_bundle.manifest, plan=between))
    with pytest.raises(UnsupportedModelError, match=r"draws at timestep 0\.5") as caught:
        compile_qnn(bundle)
    assert "tiue-export openvino --bundle" in caught.value.next_step


def test_a_chip_without_a_name_is_not_guessed_for(snapdragon_bundle, monkeypatch):
    monkeypatch.setattr("tiue_export.runtimes.qnn.has_npu", lambda: True)
    monkeypatch.setattr("tiue_export.runtimes.qnn.soc_here", lambda: None)
    form = snapdragon_bundle.manifest.compiled["qnn-v75"]
    other = replace(form, target={**form.target, "htp": "v73"})
    forms = {"qnn-v73": other, "qnn-v75": form}
    bundle = Bundle(snapdragon_bundle.root, replace(snapdragon_bundle.manifest, compiled=forms))
    with pytest.raises(RuntimeFailure, match="contexts for v73, v75") as caught:
        open_runtime("qnn", bundle, RuntimeOptions())
    assert caught.value.next_step.endswith("such as --device v73.")
    assert open_runtime("qnn", bundle, RuntimeOptions(device="v75")).device == "npu v75"


# Chips


def test_chips_are_named_by_part_number_or_architecture_one_for_each_form():
    assert socs_named((), ()) == ("sm8650",)
    assert socs_named(("x-elite",), ("v79", "81")) == ("x-elite", "sm8750", "sm8850")
    assert socs_named(("sm8550", "sm8550"), ("73",)) == ("sm8550",)
    with pytest.raises(UsageError, match="sm8550 and x-elite both have HTP v73") as caught:
        socs_named(("sm8550", "x-elite"), ())
    assert caught.value.next_step.startswith("Leave --soc x-elite out")
    with pytest.raises(UsageError, match="unknown chip 'sm8660'"):
        socs_named(("sm8660",), ())
    with pytest.raises(UsageError, match="unknown HTP architecture '68'"):
        socs_named((), ("68",))


@pytest.mark.parametrize(
    ("description", "soc"),
    [
        ("Qualcomm Technologies, Inc SM8650", "sm8650"),
        ("SM8750-AB", "sm8750"),
        ("ARMv8 (64-bit) Family 8 Model 1 Revision 201, Qualcomm X1E80100", "x-elite"),
        ("qcom,x1e80100-crd qcom,x1e80100", "x-elite"),
        ("SM6375", None),
        ("raspberrypi,5-model-b brcm,bcm2712", None),
    ],
)
def test_a_chip_is_known_by_what_its_system_says(description, soc):
    assert soc_in(description) == soc


# Whether the prompt counts


def test_a_text_that_is_19_times_too_weak_is_found(snapdragon_bundle):
    exact = open_runtime("ort", snapdragon_bundle, RuntimeOptions(device="cpu"))
    reference = load_reference(snapdragon_bundle)
    proven = snapdragon_bundle.manifest.compiled["qnn-v75"].parity
    latents = next(record for record in proven if record.subject == "latents")

    def conditioning(db: float) -> tuple[float, bool]:
        record = measure_conditioning(
            snapdragon_bundle, exact, replace(latents, value=db), reference
        )
        return record.value, record.passed

    # What is left of the effect is its nineteenth: the latents' error is the rest.
    tokens = empty_prompt(reference.arrays["input_ids"], 1)
    prompt, without = (
        latents_of(snapdragon_bundle, exact, ids, reference)
        for ids in (reference.arrays["input_ids"], tokens)
    )
    value, passed = conditioning(psnr_db(prompt, without + (prompt - without) / 19))
    assert not passed
    assert value == pytest.approx(20 * np.log10(19 / 18), abs=0.1)
    assert conditioning(latents.value)[1]
    exact.close()


def latents_of(bundle: Bundle, runtime: Runtime, tokens, reference):
    """Latents of tokens by the reference's noise."""
    values = {"input_ids": tokens, "sample": reference.arrays["sample"]}
    outputs = runtime.run("text_encoder", {"input_ids": tokens})
    values["encoder_hidden_states"] = outputs["last_hidden_state"]
    values |= runtime.run(UNET_ENCODER, bundle.spec(UNET_ENCODER).select(values))
    return runtime.run("unet_decoder", bundle.spec("unet_decoder").select(values))["latents"]


def test_the_empty_prompt_has_its_start_and_end_in_every_chunk():
    tokens = np.array([[1, 7, 8, 9, 0, 0, 1, 5, 9, 0, 0, 0]])
    assert empty_prompt(tokens, 2).tolist() == [[1, 9, 0, 0, 0, 0, 1, 9, 0, 0, 0, 0]]
    padded_by_its_end = np.array([[1, 7, 9, 9]])
    assert empty_prompt(padded_by_its_end, 1).tolist() == [[1, 9, 9, 9]]
