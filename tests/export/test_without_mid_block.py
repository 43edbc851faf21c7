"""UNets of SDXS's and BK-SDM's kind: no mid block, one resnet a level, levels that read the text
alone. In one pass and in passes, in every form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from micro_models import write_micro_unet
from teachers import load_teacher

from tiue_export import export_onnx, load_student
from tiue_export.checkpoint.parts import load_controlnet
from tiue_export.errors import UnsupportedModelError
from tiue_export.export.openvino import compile_openvino
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.reference.unet_blocks import named_blocks
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, UNET_GRAPHS
from tiue_export.student.pipeline_folder import write_scheduler

SDXS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "only_cross_attention": (True, False),
    "mid_block_type": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_micro_unet(tmp_path_factory.mktemp("sdxs") / "student", **SDXS)


@pytest.fixture(scope="module")
def student(folder):
    return load_student(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    """The same UNet as an ordinary model, with guidance: two steps, the encoder at the first."""
    student_scheduler = load_student(folder).scheduler_config
    write_scheduler(folder, student_scheduler | {"tiue_steps": None}, None)
    try:
        return load_teacher(folder, options=FasterOptions(steps=2, key_steps=(0,)))
    finally:
        write_scheduler(folder, student_scheduler, 2)


@pytest.fixture(scope="module")
def one_level(tmp_path_factory):
    """The same in one level, for what takes time: its bundle."""
    folder = tmp_path_factory.mktemp("one")
    shape = {"mid_block_type": None, "only_cross_attention": True}
    return export_onnx(
        load_student(write_micro_unet(folder / "student", **shape)), folder / "bundle"
    )


def test_the_last_skip_is_handed_on_once_and_is_what_the_decoder_starts_from(student):
    with torch.no_grad():
        features = student.encode(torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32))
    assert features.mid is features.skips[-1]
    encoder = build_graphs(student, ExportOptions(), only=UNET_GRAPHS)[0].spec
    assert [spec.name for spec in encoder.outputs] == [f"down_res_{i}" for i in range(4)]
    assert list(named_blocks(student.unet)) == [
        *(f"{part}_blocks.{i}" for part in ("down", "up") for i in range(2))
    ]


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
@pytest.mark.parametrize("kind", ["student", "teacher"])
@torch.no_grad()
def test_rows_are_the_unsplit_unets_in_every_form(kind, hoist, request):
    model = request.getfixturevalue(kind)
    graphs = {
        graph.spec.name: graph
        for graph in build_graphs(model, ExportOptions(hoist=hoist), only=UNET_GRAPHS)
    }
    random = np.random.RandomState(0)
    first = model.plan.timesteps[0]
    pool = {
        spec.name: random.standard_normal(spec.shape).astype(np.float32)
        for spec in graphs[UNET_ENCODER].spec.inputs
    }
    steps = [first, first - 300, first - 600]
    pool |= {"timestep": np.array([first], np.float32), "timesteps": np.array(steps, np.float32)}
    _, features = run_graph(graphs[UNET_ENCODER], pool)
    _, outputs = run_graph(graphs[UNET_DECODER], pool | features)
    noise, text = (torch.from_numpy(pool[name]) for name in ("sample", "encoder_hidden_states"))
    if kind == "student":
        expected, found = model.sample(noise, text).numpy(), outputs["latents"]
    else:
        expected = model.unet(noise, first, text).sample.numpy()
        found = outputs["outputs"][: len(noise)]
    assert psnr_db(expected, found) >= GATES_PSNR_DB["split"]


def test_onnx_and_openvino_graphs_are_proven(one_level):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    compiled = compile_openvino(one_level)
    records = [*one_level.manifest.parity, *compiled.manifest.compiled["openvino"].parity]
    assert {r.hop.split()[0] for r in records} >= {"split", "hoisted", "ONNX", "openvino"}
    assert all(record.passed for record in records)


@torch.no_grad()
def test_the_neural_engines_layout_computes_the_same(student):
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    from tiue_export.export.coreml.layout import with_layout

    for graph in build_graphs(student, ExportOptions(), only=UNET_GRAPHS):
        feeds = [torch.randn_like(tensor) for tensor in graph.example]
        expected = graph.module(*feeds)
        found = with_layout(graph, attention="split", linear="conv", decoder_batch=1)(*feeds)
        for wanted, got in zip(expected, found, strict=True):
            assert psnr_db(wanted.numpy(), got.numpy()) >= GATES_PSNR_DB["split"]


def test_a_controlnet_is_refused_for_want_of_a_middle_block(student, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with pytest.raises(UnsupportedModelError, match="a middle block, and this model has none"):
        load_controlnet(tmp_path, dict(student.unet.config))
