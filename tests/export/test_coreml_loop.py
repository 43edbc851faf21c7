"""Core ML packages of a model in a loop: one number of steps, filled up, proven, drawn from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from teachers import load_teacher

from tiue_export import Pipeline, export_onnx, open_bundle
from tiue_export.bundle.read import Bundle
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import CheckpointError, RuntimeFailure, UsageError
from tiue_export.export.coreml.profiles import CoremlOptions
from tiue_export.export.own_student import open_student
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes.coreml.runtime import package_of
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.specs import CONTROLNET, GRAPH_NAMES, UNET_DECODER, UNET_ENCODER, RuntimeOptions
from tiue_export.student.lora import merge_lora
from tiue_export.student.pipeline_folder import write_scheduler

pytest.importorskip("coremltools", reason="coremltools is not installed: tiue-export[coreml]")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: tiue-export[coreml]")

from tiue_export.export.coreml.bundle import FOLDER, compile_coreml, plan_for
from tiue_export.export.coreml.mil.evaluator import MilProgram


def packages(bundle: Bundle, micro_teacher: Path, **options: object) -> Bundle:
    settings = CoremlOptions(**{"precision": "fp32", **options})
    return compile_coreml(bundle, load_teacher(micro_teacher), settings)


@pytest.fixture(scope="module")
def micro_teacher(micro_pipeline, tmp_path_factory):
    """The smallest student as an ordinary model: it records no K."""
    folder = shutil.copytree(micro_pipeline, tmp_path_factory.mktemp("micro") / "teacher")
    write_scheduler(folder, load_family("tiny").scheduler, None)
    return folder


@pytest.fixture(scope="module")
def own(micro_teacher, tmp_path_factory):
    """Steps 0 to 3, the encoder at 0 and 1, with the shared part in the encoder's graph."""
    options = FasterOptions(steps=4, key_steps=(0, 1), guidance=3.0)
    folder = tmp_path_factory.mktemp("loop") / "bundle"
    teacher = load_teacher(micro_teacher, options=options)
    return export_onnx(teacher, folder, ExportOptions(hoist="encoder"))


@pytest.fixture(scope="module")
def one_step(micro_teacher, tmp_path_factory):
    """Six steps, the encoder at 0, 1 and 3, with float32 packages of one step. Shared."""
    options = FasterOptions(steps=6, key_steps=(0, 1, 3), guidance=5.0)
    folder = tmp_path_factory.mktemp("one") / "bundle"
    bundle = export_onnx(load_teacher(micro_teacher, options=options), folder)
    return packages(bundle, micro_teacher, linear="linear")


@pytest.fixture(scope="module")
def two_steps(own, micro_teacher, tmp_path_factory):
    """Packages of two steps as a Neural Engine takes them: channels first, heads apart. Shared."""
    root = tmp_path_factory.mktemp("two") / "bundle"
    copy = open_bundle(shutil.copytree(own.root, root))
    return packages(copy, micro_teacher, decoder_batch=2, linear="conv", attention="split")


def drawn(bundle: Bundle, runtime: str) -> np.ndarray:
    with Pipeline.open(bundle, runtime) as pipeline:
        return pipeline("a red fox", seed=3, negative_prompt="snow").pictures[0].latents


def test_every_package_is_listed_and_proven(one_step):
    compiled = one_step.manifest.compiled[FOLDER]
    assert list(compiled.graphs) == list(GRAPH_NAMES)
    assert [record.subject for record in compiled.parity] == [
        "prompt_embeds", "encoder features", "outputs", "picture",
    ]  # fmt: skip
    assert {record.gate for record in compiled.parity} == {GATES_PSNR_DB["fp32"]}
    assert all(record.passed for record in compiled.parity)


def test_one_step_at_a_time_is_the_default_of_a_loop_alone(faster_bundle, tiny_bundle):
    options = CoremlOptions(profile="mac-gpu")
    assert plan_for(faster_bundle.manifest, options).decoder_batch == 1
    assert plan_for(tiny_bundle.manifest, options).decoder_batch == 4
    asked = CoremlOptions(profile="mac-gpu", decoder_batch=2)
    assert plan_for(faster_bundle.manifest, asked).decoder_batch == 2


@pytest.mark.parametrize("made", ["one_step", "two_steps"])
def test_packages_draw_what_onnx_runtime_draws(made, request):
    bundle = request.getfixturevalue(made)
    assert psnr_db(drawn(bundle, "ort"), drawn(bundle, "coreml")) >= GATES_PSNR_DB["fp32-loop"]


@pytest.mark.parametrize("made", ["one_step", "two_steps"])
def test_parity_of_the_runtime_passes_on_graphs_and_loop(made, request):
    bundle = request.getfixturevalue(made)
    runtime = open_runtime("coreml", bundle, RuntimeOptions())
    records = measure_runtime(bundle, runtime, load_reference(bundle))
    assert {"outputs", "latents", "picture"} <= {record.subject for record in records}
    assert all(record.passed for record in records)


def test_fewer_steps_are_filled_up_and_more_are_refused(two_steps):
    runtime = open_runtime("coreml", two_steps, RuntimeOptions())
    assert runtime.step_limit() == 2
    assert runtime.batch_range() == (1, 1)
    known = load_reference(two_steps).arrays
    encoder, decoder = (two_steps.spec(graph) for graph in (UNET_ENCODER, UNET_DECODER))
    pool = {**known, **runtime.run(UNET_ENCODER, encoder.select(known))}
    times = known["timesteps"]

    def rows(count: int) -> np.ndarray:
        feeds = decoder.select({**pool, "timesteps": times[:count]})
        return runtime.run(UNET_DECODER, feeds)["outputs"]

    assert rows(1).shape == (2, 4, 8, 8)
    np.testing.assert_array_equal(rows(1), rows(2)[:2])
    with pytest.raises(RuntimeFailure, match="3 steps were asked for at once; this package takes"):
        rows(3)


def test_the_time_embedding_stays_in_float32_in_half_precision(own, micro_teacher, tmp_path):
    copy = open_bundle(shutil.copytree(own.root, tmp_path / "half"))
    bundle = packages(copy, micro_teacher, precision="fp16")
    for graph in (UNET_ENCODER, UNET_DECODER):
        program = MilProgram.open(package_of(bundle, graph).path)
        feeds = {
            name: np.full(kind.shape, 901.0 if name.startswith("timestep") else 0.1, np.float32)
            for name, kind in program.inputs.items()
        }
        half, exact = (program.run(feeds, kind).records for kind in ("fp16", "fp32"))
        sines = [(a, b) for a, b in zip(half, exact, strict=True) if a.op in ("sin", "cos")]
        assert len(sines) == 2
        assert all(a.max_abs == b.max_abs for a, b in sines)
    assert all(record.passed for record in bundle.manifest.compiled[FOLDER].parity)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"compress": "w8a8", "prompts": ("a fox",), "precision": "fp16"}, "--compress w8a8"),
        ({"target_mb": 1.0, "precision": "fp16"}, "--target-mb is not for"),
        ({"target_psnr_db": 40.0, "precision": "fp16"}, "--target-psnr is not for"),
        ({"swift_bundle": True}, "--swift-bundle is not for"),
        ({"sizes": ((64, 64), (128, 64)), "target": "iOS18"}, "several --size is not for"),
        ({"sizes": ((128, 64),), "target": "iOS18"}, "--size differs from the 64x64 of"),
    ],
)
def test_what_packages_of_a_loop_cannot_be_is_refused(own, micro_teacher, options, part):
    with pytest.raises(UsageError) as caught:
        packages(own, micro_teacher, **options)
    assert part in caught.value.message


def test_packages_come_without_a_controlnet(own, micro_teacher):
    graphs = {**own.manifest.graphs, CONTROLNET: own.manifest.graphs[UNET_ENCODER]}
    with_control = Bundle(own.root, replace(own.manifest, graphs=graphs))
    with pytest.raises(UsageError, match="has a ControlNet"):
        packages(with_control, micro_teacher)


def test_an_adapter_merged_at_the_export_is_merged_for_the_packages_too(
    own, micro_teacher, tmp_path
):
    teacher = load_teacher(micro_teacher)
    (name, layer), *_ = (
        (name, module)
        for name, module in teacher.unet.named_modules()
        if name.endswith("attn1.to_q")
    )
    adapter, random = tmp_path / "style.safetensors", np.random.default_rng(0)
    down, up = (layer.in_features, 2), (2, layer.out_features)
    layers = {
        f"unet.{name}.lora_A.weight": random.standard_normal(down[::-1]).astype(np.float32),
        f"unet.{name}.lora_B.weight": random.standard_normal(up[::-1]).astype(np.float32),
    }
    save_file(layers, adapter)
    merged = merge_lora(teacher, adapter, 0.5)
    ours = replace(own.manifest, source=replace(own.manifest.source, sha256=merged.source.sha256))
    again = open_student(CheckpointRequest(str(micro_teacher), lora=(f"{adapter}:0.5",)), ours)
    assert again.source.sha256 == merged.source.sha256
    assert again.plan == own.manifest.plan
    with pytest.raises(CheckpointError, match="is not the student of this bundle"):
        open_student(CheckpointRequest(str(micro_teacher)), ours)


@pytest.mark.slow
def test_the_command_exports_a_loop_with_the_shared_part_in_the_encoder(run, micro_teacher):
    arguments = ["coreml", "--ckpt", micro_teacher, "--method", "faster", "--steps", "3"]
    code, out, err = run(*arguments, "--precision", "fp32", "--out", "fox")
    assert code == 0, err
    assert "decoder batch 1" in out
    manifest = open_bundle("fox").manifest
    assert (manifest.plan.one_pass, manifest.hoisted) == (False, "encoder")
    assert list(manifest.compiled[FOLDER].graphs) == list(GRAPH_NAMES)


def test_the_command_explains_what_it_cannot_do(run, own, micro_teacher):
    command = ["coreml", "--ckpt", micro_teacher]
    for arguments, part in (
        (["--key-steps", "0,1"], "--key-steps is for --method few-step and faster"),
        (
            ["--method", "faster", "--swift-bundle", "--out", "x"],
            "--swift-bundle is not for Core ML packages of what draws in a loop",
        ),
        (
            ["--bundle", own.root, "--method", "faster"],
            "--method is for the export of a checkpoint",
        ),
    ):
        code, _, err = run(*command, *arguments)
        assert code != 0
        assert part in err.replace("\n", " ")
        assert "Traceback" not in err
    assert not Path("x").exists()  # refused before the export
