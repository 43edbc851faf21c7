"""Core AI assets: made on this machine and run by Apple's interpreter."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from teachers import load_teacher

from tiue_export import load_student
from tiue_export.bundle.read import open_bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import (
    BundleError,
    CheckpointError,
    ParityError,
    RuntimeFailure,
    UsageError,
)
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.specs import GRAPH_NAMES, UNET_DECODER, UNET_GRAPHS, RuntimeOptions, step_limit
from tiue_export.system.install import install_line

pytest.importorskip("coreai", reason="coreai-core is not installed")

from tiue_export.export.contract import export_contract
from tiue_export.export.coreai import (
    FOLDER,
    CoreaiOptions,
    compile_coreai,
)


@pytest.fixture
def made(coreai_bundle):
    """The tiny bundle with fp32 assets. Shared."""
    return coreai_bundle


@pytest.fixture
def own(micro_bundle, tmp_path):
    """A copy of the smallest bundle to add assets to."""
    return open_bundle(shutil.copytree(micro_bundle.root, tmp_path / "own"))


def test_every_graph_is_listed_and_within_the_float32_gate(made):
    compiled = made.manifest.compiled[FOLDER]
    assert list(compiled.graphs) == list(GRAPH_NAMES)
    assert compiled.version == "1.0.0b3"
    assert {record.subject for record in compiled.parity} == {
        "encoder_hidden_states", "latents", "picture",
    }  # fmt: skip
    assert {record.gate for record in compiled.parity} == {GATES_PSNR_DB["fp32"]}
    assert all(record.passed for record in compiled.parity)
    for graph, form in compiled.graphs.items():
        assert form.path == f"coreai/{graph}.aimodel/metadata.json"
        assert (made.root / form.path).is_file()


def test_it_draws_the_picture_that_onnx_runtime_draws(made):
    with Pipeline.open(made) as reference, Pipeline.open(made, runtime="coreai") as pipeline:
        expected = reference("a red fox", seed=3).pictures[0]
        found = pipeline("a red fox", seed=3).pictures[0]
    assert psnr_db(expected.latents, found.latents) > 100
    difference = np.asarray(expected.image, np.int16) - np.asarray(found.image, np.int16)
    assert np.abs(difference).max() <= 1


def test_a_loop_takes_one_step_at_once_and_is_proven_whole(bare_teacher, tmp_path):
    options = FasterOptions(steps=4, key_steps=(0, 2), guidance=3.0)
    teacher = load_teacher(bare_teacher, options=options)
    bundle = export_contract(teacher, tmp_path / "loop")
    bundle = compile_coreai(bundle, teacher, CoreaiOptions("fp32"))
    compiled = bundle.manifest.compiled[FOLDER]
    assert [(r.subject, r.gate) for r in compiled.parity] == [
        ("outputs", GATES_PSNR_DB["fp32"]),
        ("latents", GATES_PSNR_DB["fp32-loop"]),
    ]
    assert all(record.passed for record in compiled.parity)
    runtime = open_runtime("coreai", bundle, RuntimeOptions())
    assert step_limit(runtime) == 1
    runtime.close()


@pytest.mark.slow
def test_half_precision_passes_its_gate(own, micro_folder):
    bundle = compile_coreai(own, load_student(micro_folder))
    compiled = bundle.manifest.compiled[FOLDER]
    assert list(compiled.graphs) == list(UNET_GRAPHS)
    assert compiled.flags == {"precision": "fp16"}
    assert [(r.gate, r.passed) for r in compiled.parity] == [(GATES_PSNR_DB["fp16"], True)]
    weights = sum(f.size_bytes for f in compiled.graphs[UNET_DECODER].files.values())
    onnx = (bundle.root / UNET_DECODER / "model.onnx.data").stat().st_size
    assert weights < 0.7 * onnx
    with pytest.raises(BundleError, match="has Core AI assets already"):
        compile_coreai(bundle, load_student(micro_folder))
    with pytest.raises(UsageError, match="compute in fp16; got fp32"):
        open_runtime("coreai", bundle, RuntimeOptions(precision="fp32"))


def test_a_failed_gate_leaves_the_bundle_as_it_was(own, micro_folder, monkeypatch):
    monkeypatch.setitem(GATES_PSNR_DB, "fp32", 290.0)
    with pytest.raises(ParityError, match="gate 290 dB"):
        compile_coreai(own, load_student(micro_folder), CoreaiOptions("fp32"))
    assert open_bundle(own.root).manifest.compiled == {}
    assert not (own.root / FOLDER).exists()


def test_the_checkpoint_of_another_student_is_refused(own, tiny_pipeline):
    with pytest.raises(CheckpointError, match="is not the student of this bundle"):
        compile_coreai(own, load_student(tiny_pipeline))


@pytest.mark.filterwarnings("ignore:coreai-torch has only been validated:UserWarning")
def test_a_graph_that_cannot_be_converted_is_named(own, micro_folder, monkeypatch):
    import coreai_torch

    def fail(*arguments, **options):
        raise NotImplementedError("no lowering for aten.frobnicate")

    monkeypatch.setattr(coreai_torch.TorchConverter, "add_exported_program", fail)
    with pytest.raises(RuntimeFailure, match=r"cannot convert unet_encoder: no lowering for aten"):
        compile_coreai(own, load_student(micro_folder))
    assert open_bundle(own.root).manifest.compiled == {}


def test_a_damaged_asset_is_found_before_the_runtime_would_crash_on_it(made, tmp_path):
    copy = Path(shutil.copytree(made.root, tmp_path / "copy"))
    (copy / FOLDER / "unet_encoder.aimodel" / "main.mlirb").write_bytes(b"not a program")
    with pytest.raises(BundleError, match=r"main\.mlirb (is truncated|was altered|has 13 bytes)"):
        open_bundle(copy)


def test_a_closed_runtime_says_so_and_closes_again(made):
    runtime = open_runtime("coreai", made, RuntimeOptions())
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeFailure, match="the coreai runtime is closed"):
        runtime.run("unet_encoder", {})


def test_the_command_prints_both_tables_and_json(run, own, micro_folder):
    arguments = ["--ckpt", micro_folder, "--bundle", own.root, "--precision", "fp32"]
    code, out, err = run("coreai", *arguments)
    assert code == 0, err
    assert "ODIE" not in out + err
    assert "Core AI 1.0.0b3 against the student" in out
    assert "tiue-export parity" in out
    code, out, err = run("coreai", *arguments, "--force", "--json")
    assert code == 0, err
    assert set(json.loads(out)["graphs"]) == set(UNET_GRAPHS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "b"], "--ckpt is missing: Core AI reads no ONNX"),
        (["--ckpt", "c.safetensors"], "c.safetensors does not exist"),
    ],
)
def test_bad_input_is_one_clear_message(run, arguments, message):
    code, _, err = run("coreai", *arguments)
    assert code == UsageError.exit_code
    assert message in " ".join(err.split())


def test_an_unknown_precision_and_a_size_for_a_bundle_are_refused(run, own, micro_folder):
    arguments = ["coreai", "--ckpt", micro_folder, "--bundle", own.root]
    code, _, err = run(*arguments, "--precision", "int8")
    assert (code, "unknown precision 'int8'" in err) == (UsageError.exit_code, True)
    code, _, err = run(*arguments, "--height", 128)
    assert (code, "--height is for the export of a checkpoint" in err) == (
        UsageError.exit_code,
        True,
    )


def test_a_wrong_precision_is_refused_before_anything_is_exported(run, micro_folder, tmp_path):
    code, _, err = run("coreai", "--ckpt", micro_folder, "--precision", "int8")
    assert (code, "unknown precision 'int8'" in err) == (UsageError.exit_code, True)
    assert list(tmp_path.iterdir()) == []


def test_an_audit_that_kept_float32_is_not_overruled(own, micro_folder):
    record = replace(own.manifest.graphs[UNET_DECODER], float32_modules=("up_blocks.0",))
    graphs = {**own.manifest.graphs, UNET_DECODER: record}
    audited = replace(own, manifest=replace(own.manifest, graphs=graphs))
    with pytest.raises(UsageError, match=r"keeps 1 module\(s\) in float32"):
        compile_coreai(audited, load_student(micro_folder))
    assert not (own.root / FOLDER).exists()


def test_a_number_of_threads_is_refused_as_core_ai_chooses_it(made):
    with pytest.raises(UsageError, match="Core AI chooses its threads itself"):
        open_runtime("coreai", made, RuntimeOptions(threads=2))


def test_without_assets_the_runtime_says_how_to_make_them(tiny_bundle):
    with pytest.raises(BundleError, match="has no Core AI assets"):
        open_runtime("coreai", tiny_bundle, RuntimeOptions())


def test_without_the_packages_the_extra_is_named(run, micro_folder, monkeypatch):
    from tiue_export.registry import packages as registry

    real = registry._found
    monkeypatch.setattr(registry, "_found", lambda name: "coreai" not in name and real(name))
    code, _, err = run("coreai", "--ckpt", micro_folder)
    assert code == 8
    assert install_line("coreai") in err
