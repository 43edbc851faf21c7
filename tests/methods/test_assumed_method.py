"""What a checkpoint is taken for where nobody says: a student, unless its scheduler denies it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# As the models' own folders have them.
DENYING = {
    "SD-Turbo": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    "LCM": {"_class_name": "LCMScheduler", "timestep_spacing": "leading"},
    "TCD": {"_class_name": "TCDScheduler", "timestep_spacing": "leading"},
    "an ordinary model with DPM-Solver++": {"_class_name": "DPMSolverMultistepScheduler"},
    "SD 2.1 with a trailing DDIM": {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
}
AGREEING = {
    "SD 1.5": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "DDIM": {"_class_name": "DDIMScheduler", "timestep_spacing": "leading"},
}


def folder_with(pipeline: Path, place: Path, scheduler: dict, **recorded: int) -> Path:
    """A pipeline folder with another scheduler."""
    shutil.copytree(pipeline, place)
    file = place / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**SD, **scheduler, **recorded}))
    return place


@pytest.mark.parametrize("model", DENYING)
def test_a_model_whose_scheduler_is_not_tiues_is_not_taken_for_a_student(
    run, micro_pipeline, tmp_path, model
):
    ckpt = folder_with(micro_pipeline, tmp_path / "model", DENYING[model])
    code, out, err = run("onnx", "--ckpt", ckpt, "--out", "bundle")
    name = DENYING[model]["_class_name"]
    said = " ".join(err.split())
    assert (code, out) == (5, "")
    assert f"model is no TiUE student by its scheduler, {name} with " in said
    assert "Add --method faster for an ordinary model, or --method tiue" in said
    assert not Path("bundle").exists()


@pytest.mark.parametrize("method", ["tiue", "faster"])
def test_a_method_that_is_named_decides(run, micro_pipeline, tmp_path, method):
    ckpt = folder_with(micro_pipeline, tmp_path / "model", DENYING["SD-Turbo"])
    assert run("onnx", "--ckpt", ckpt, "--dry-run")[0] == 5
    assert run("onnx", "--ckpt", ckpt, "--dry-run", "--method", method)[0] == 0


@pytest.mark.parametrize("model", AGREEING)
def test_a_model_that_records_nothing_is_taken_for_a_student_and_that_is_said(
    run, micro_pipeline, tmp_path, model
):
    ckpt = folder_with(micro_pipeline, tmp_path / "model", AGREEING[model])
    code, out, err = run("onnx", "--ckpt", ckpt, "--dry-run")
    said = " ".join((out + err).split())
    assert code == 0
    assert "records no K and is taken for a student of K=4" in said
    assert "--method faster" in said


def test_a_student_that_records_its_k_is_one_whatever_its_scheduler(run, micro_pipeline, tmp_path):
    ckpt = folder_with(
        micro_pipeline, tmp_path / "model", DENYING["SD 2.1 with a trailing DDIM"], tiue_steps=1
    )
    assert run("onnx", "--ckpt", ckpt, "--dry-run")[0] == 0
