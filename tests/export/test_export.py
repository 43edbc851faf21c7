"""What an exported bundle holds, in every variant, and that ONNX Runtime agrees with it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tiue_export import ExportOptions, Pipeline, export_onnx, load_student
from tiue_export.benchmarks.synthetic import write_ldm_file
from tiue_export.errors import BundleError, ParityError
from tiue_export.export.dry_run import plan_export
from tiue_export.export.onnx.write import OPSET, onnx_from_graph
from tiue_export.graphs.build import build_graphs
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import RuntimeOptions
from tiue_export.system.progress import Observer


def graph_hashes(bundle) -> dict[str, dict[str, str]]:
    graphs = bundle.manifest.graphs
    return {n: {f: r.sha256 for f, r in g.files.items()} for n, g in graphs.items()}


def onnx_model(bundle, graph: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(graph), load_external_data=False)


def test_the_bundle_has_the_contracts_layout(tiny_bundle):
    root = tiny_bundle.root
    for path in (
        "tiue.json",
        "model_index.json",
        "text_encoder/model.onnx",
        "text_encoder/model.onnx.data",
        "text_encoder/config.json",
        "unet_encoder/model.onnx",
        "unet_decoder/model.onnx",
        "vae_decoder/model.onnx",
        "vae_decoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "parity/reference.safetensors",
    ):
        assert (root / path).is_file(), path
    listed = {*tiny_bundle.manifest.files, "tiue.json"}
    for graph in tiny_bundle.manifest.graphs.values():
        listed |= set(graph.files)
    assert listed == {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_every_file_of_a_bundle_is_as_readable_as_the_umask_allows(tiny_bundle):
    umask = os.umask(0)
    os.umask(umask)
    modes = {p.stat().st_mode & 0o777 for p in tiny_bundle.root.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~umask}


def test_every_hop_is_measured_and_passed(tiny_bundle):
    hops = {(record.hop, record.subject) for record in tiny_bundle.manifest.parity}
    assert {hop for hop, _ in hops} == {
        "split",
        "closed form",
        "lowered",
        "hoisted",
        "ONNX fp32",
        "ONNX fp32 chain",
    }
    assert all(r.passed and r.gate is not None for r in tiny_bundle.manifest.parity)
    assert all("real prompt" in record.inputs for record in tiny_bundle.manifest.parity)


def test_nodes_carry_module_paths_and_no_metadata_of_this_machine(tiny_bundle):
    model = onnx_model(tiny_bundle, "unet_encoder")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "down_blocks.0.resnets.0.conv1/Conv" in names
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_q/MatMul" in names
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.metadata_props
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    weights = {tensor.name for tensor in model.graph.initializer}
    assert "down_blocks.0.resnets.0.conv1.weight" in weights
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight_transposed" in weights
    text = (tiny_bundle.root / "unet_encoder" / "model.onnx").read_bytes()
    assert b"site-packages" not in text
    assert str(Path.cwd()).encode() not in text


def test_the_time_mlp_is_folded_away(tiny_bundle):
    for graph in ("unet_encoder", "unet_decoder"):
        names = [t.name for t in onnx_model(tiny_bundle, graph).graph.initializer]
        assert not any("time_emb" in n and n.endswith("weight_transposed") for n in names)
        operators = {node.op_type for node in onnx_model(tiny_bundle, graph).graph.node}
        assert not operators & {"Sin", "Cos"}


def test_exporting_again_and_from_an_ldm_file_gives_identical_graphs(
    tiny_bundle, tiny_pipeline, tmp_path
):
    file = write_ldm_file(tiny_pipeline, tmp_path / "ldm.safetensors")
    from_ldm = export_onnx(load_student(file, base=tiny_pipeline), tmp_path / "ldm")
    assert graph_hashes(from_ldm) == graph_hashes(tiny_bundle)


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(hoist="none"),
        pytest.param(ExportOptions(hoist="encoder"), marks=pytest.mark.slow),
        ExportOptions(height=96, width=32, batch=2, merge_below=0.02),
    ],
    ids=["naive", "encoder", "96x32-batch2-merged"],
)
def test_every_variant_passes_its_gates_and_draws(options, micro_pipeline, tmp_path):
    bundle = export_onnx(load_student(micro_pipeline), tmp_path / "bundle", options)
    manifest = bundle.manifest
    assert all(record.passed for record in manifest.parity)
    assert manifest.precision == "fp32"
    with Pipeline.open(bundle) as pipeline:
        image = pipeline("a red fox", seed=0).images[0]
    assert image.size == (options.width or 64, options.height or 64)
    if options.merge_below:
        # Hoisting stays proven under merging: same rows, same weights, at the exact gate.
        hoisted = next(r for r in manifest.parity if r.hop == "hoisted")
        assert hoisted.gate == 120
        merged = next(r for r in manifest.parity if r.hop.startswith("merged"))
        assert merged.gate is None
        assert 20 < merged.value < 120
        assert manifest.plan.merged_timesteps == (1,)


def test_a_half_bundle_passes_its_gates_and_draws(half_bundle):
    manifest = half_bundle.manifest
    assert manifest.precision == "fp16"
    assert all(record.passed for record in manifest.parity)
    assert {r.hop for r in manifest.parity} >= {"fp16 arithmetic", "ONNX fp16"}
    assert half_bundle.spec("unet_decoder").outputs[0].dtype == "float32"
    assert half_bundle.spec("unet_encoder").outputs[0].dtype == "float16"
    with Pipeline.open(half_bundle) as pipeline:
        assert pipeline("a red fox", seed=0).images[0].size == (64, 64)


def test_statistics_and_the_weighted_sum_stay_in_float32_in_half_graphs(half_bundle):
    for name in half_bundle.manifest.graphs:
        model = onnx_model(half_bundle, name)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.value_info, *inferred.output, *inferred.input)
        kinds = {v.name: v.type.tensor_type.elem_type for v in values}
        norms = [
            n
            for n in model.graph.node
            if n.op_type in ("InstanceNormalization", "LayerNormalization")
        ]
        assert norms
        assert {kinds[node.output[0]] for node in norms} == {onnx.TensorProto.FLOAT}
        convolutions = [n for n in model.graph.node if n.op_type in ("Conv", "MatMul")]
        assert {kinds[node.output[0]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
        if name == "unet_decoder":
            sums = [n for n in model.graph.node if n.op_type == "ReduceSum"]
            assert [kinds[node.output[0]] for node in sums] == [onnx.TensorProto.FLOAT]


def test_layer_names_are_the_same_at_every_precision(tiny_bundle, half_bundle):
    heavy = ("Conv", "MatMul", "Gemm", "InstanceNormalization", "LayerNormalization")
    for graph in tiny_bundle.manifest.graphs:
        single, half = (
            {node.name for node in onnx_model(bundle, graph).graph.node if node.op_type in heavy}
            for bundle in (tiny_bundle, half_bundle)
        )
        assert half == single
        assert half


@pytest.mark.slow
def test_softmax_is_in_float32_where_the_model_asks_for_upcast(micro_folder, tmp_path):
    folder = Path(shutil.copytree(micro_folder, tmp_path / "student"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "upcast_attention": True}))
    options = ExportOptions(precision="fp16")
    graph = build_graphs(load_student(folder), options, only=("unet_encoder", "unet_decoder"))[1]
    onnx_from_graph(graph, tmp_path / "decoder")
    model = onnx.load(tmp_path / "decoder" / "model.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    softmaxes = [n for n in model.graph.node if n.op_type == "Softmax"]
    assert {kinds[n.output[0]] for n in softmaxes} == {onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def any_batch(micro_pipeline, tmp_path_factory):
    """A bundle with an open batch and a tiny autoencoder. Shared."""
    options = ExportOptions(dynamic_batch=True, batch=2)
    return export_onnx(load_student(micro_pipeline), tmp_path_factory.mktemp("any") / "b", options)


def test_a_dynamic_batch_bundle_runs_any_batch(any_batch):
    bundle = any_batch
    assert bundle.manifest.batch is None
    assert bundle.spec("unet_decoder").inputs[0].shape == ("batch", 4, 8, 8)
    with Pipeline.open(bundle) as pipeline:
        together = pipeline("a red fox", seed=3, count=5)
        alone = [pipeline("a red fox", seed=3 + i).pictures[0] for i in range(5)]
    for one, row in zip(alone, together.pictures, strict=True):
        assert psnr_db(one.latents, row.latents) > 100


@pytest.fixture(scope="module")
def unusual(micro_folder, tmp_path_factory):
    """A folder with another epsilon and without its scheduler class's defaults; its bundle, and
    what its export reported. Shared."""
    place = tmp_path_factory.mktemp("unusual")
    folder = Path(shutil.copytree(micro_folder, place / "student"))
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "norm_eps": 1e-2}))
    config = folder / "scheduler" / "scheduler_config.json"
    kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "set_alpha_to_one"}
    config.write_text(json.dumps({k: v for k, v in kept.items() if k != "timestep_spacing"}))
    reports = []
    observer = Observer(on_done=reports.append)
    return folder, export_onnx(load_student(folder), place / "bundle", observer=observer), reports


def test_a_scheduler_that_leaves_out_its_classes_defaults_exports(unusual):
    """The loop that proves the closed form must fill gaps as the class that wrote the file does."""
    closed = next(r for r in unusual[1].manifest.parity if r.hop == "closed form")
    assert closed.value > 120


def test_the_torch_runtime_follows_the_checkpoints_own_configuration(unusual):
    folder, bundle, _ = unusual
    runtime = open_runtime("torch", bundle, RuntimeOptions(checkpoint=str(folder)))
    records = measure_runtime(bundle, runtime, load_reference(bundle))
    assert all(record.value > 100 for record in records)


def test_a_bare_unet_exports_its_two_graphs_and_says_so(micro_bundle):
    assert list(micro_bundle.manifest.graphs) == ["unet_encoder", "unet_decoder"]
    assert "no text encoder" in micro_bundle.manifest.parity[0].inputs
    with pytest.raises(BundleError, match="has no text_encoder: it was exported from"):
        Pipeline.open(micro_bundle)


def test_a_tiny_autoencoder_gets_its_own_scaling_factor(any_batch):
    assert any_batch.manifest.vae_scaling_factor == 1.0
    config = json.loads((any_batch.root / "vae_decoder" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderTiny", 1.0)


def test_text_encoder_and_vae_run_by_name_as_optimum_users_expect(tiny_bundle):
    """File and tensor names of optimum's layout, without optimum."""
    text = ort.InferenceSession(tiny_bundle.root / "text_encoder" / "model.onnx")
    (hidden,) = text.run(["last_hidden_state"], {"input_ids": np.zeros((1, 77), np.int64)})
    assert hidden.shape == (1, 77, 32)
    vae = ort.InferenceSession(tiny_bundle.root / "vae_decoder" / "model.onnx")
    (sample,) = vae.run(["sample"], {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)})
    assert sample.shape == (1, 3, 64, 64)


def test_a_failing_gate_leaves_nothing_unless_the_loss_is_allowed(
    micro_folder, tmp_path, monkeypatch
):
    student = load_student(micro_folder)
    monkeypatch.setitem(GATES_PSNR_DB, "fp32", 290.0)
    with pytest.raises(ParityError) as caught:
        export_onnx(student, tmp_path / "bundle")
    assert re.search(
        r"checks failed: ONNX fp32, unet_encoder: 1\d\d\.\d dB, gate 290", str(caught.value)
    )
    assert list(tmp_path.iterdir()) == []
    bundle = export_onnx(student, tmp_path / "bundle", allow_parity_loss=True)
    assert bundle.manifest.parity_loss_allowed


def test_stages_report_time_size_and_memory(unusual):
    _, bundle, reports = unusual
    stages = [report.stage for report in reports]
    graphs = [f"export {g}" for g in bundle.manifest.graphs]
    assert stages[:3] == ["run student in fp32", *graphs]
    assert all(report.peak_memory_bytes > 1e7 and report.seconds > 0 for report in reports)
    assert all(r.size_bytes > 0 for r in reports if r.stage.startswith("export"))


def test_the_plan_predicts_the_size_on_disk(tiny_student, tiny_bundle):
    plan = plan_export(tiny_student, ExportOptions())
    assert [graph.name for graph in plan.graphs] == list(tiny_bundle.manifest.graphs)
    data = sum(p.stat().st_size for p in tiny_bundle.root.rglob("*.data"))
    assert plan.size_bytes == pytest.approx(data, rel=0.2)
    assert plan.memory_bytes > 1e9


def test_the_manifest_records_origin_and_constants(tiny_bundle, tiny_student):
    manifest = tiny_bundle.manifest
    assert manifest.source == tiny_student.source
    assert manifest.plan == tiny_student.plan
    assert manifest.vae_scaling_factor == 0.18215
    assert (manifest.latent_shape, manifest.text_shape) == ((1, 4, 8, 8), (1, 77, 32))
    assert manifest.tools["torch"] == torch.__version__.split("+")[0] or manifest.tools["torch"]
