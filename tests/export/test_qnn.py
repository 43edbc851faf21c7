"""Snapdragon: contexts really compiled by Qualcomm's compiler, and run in its emulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tiue_export import Pipeline, export_onnx, load_student, open_bundle
from tiue_export.bundle.archive import pack_bundle, unpack_bundle
from tiue_export.bundle.read import Bundle
from tiue_export.errors import (
    BundleError,
    ParityError,
    ResourceError,
    RuntimeFailure,
    TiueWarning,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.export.qnn.bundle import QnnOptions, compile_qnn
from tiue_export.proof.conditioning import SUBJECT, empty_prompt
from tiue_export.proof.parity import load_reference
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, RuntimeOptions

pytest.importorskip("onnxruntime_qnn")
EMULATOR = RuntimeOptions(device="emulator")


@pytest.fixture(scope="session")
def snapdragon_bundle(micro_pipeline, made_once) -> Bundle:
    """A student of all parts in one pass, with contexts for HTP v75. Shared."""

    def make(folder: Path) -> Path:
        export_onnx(load_student(micro_pipeline), folder)
        compile_qnn(open_bundle(folder))
        return folder

    return open_bundle(made_once("snapdragon", make))


def test_every_graph_has_a_context_that_the_emulator_proves(snapdragon_bundle):
    form = snapdragon_bundle.manifest.compiled["qnn-v75"]
    assert form.target == {"htp": "v75", "soc": "sm8650", "soc_model": "57"}
    assert set(form.graphs) == set(snapdragon_bundle.manifest.graphs)
    for name, graph in form.graphs.items():
        assert list(graph.files) == [f"qnn-v75/{name}.onnx", f"qnn-v75/{name}_qnn.bin"]
        assert graph.report["compile_s"] > 0
        assert graph.report["peak_memory_bytes"] > 1e7
    subjects = {record.subject: record for record in form.parity}
    assert set(subjects) == {"encoder_hidden_states", "latents", "picture", SUBJECT}
    for record in form.parity:
        assert record.passed, record
        print(record)
