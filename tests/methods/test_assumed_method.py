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
# As the models' own folders have them, and what each is taken for.
RECOGNISED = {
    "sd-turbo": (
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
        "one step",
    ),
    "lcm": ({"_class_name": "LCMScheduler", "timestep_spacing": "leading"}, "4 steps"),
    "tcd": ({"_class_name": "TCDScheduler", "timestep_spacing": "leading"}, "4 steps"),
    "euler-ancestral": (
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        "one step",
    ),
}
DENYING = {
    "an ordinary model with DPM-Solver++": {"_class_name": "DPMSolverMultistepScheduler"},
    "an ordinary model with Euler": {"_class_name": "EulerDiscreteScheduler"},
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
    assert "Add --method faster for an ordinary model, --method tiue to take it" in said
    assert "or --recipe NAME for a few-step student out of: tiue-export recipes" in said
    assert not Path("bundle").exists()


@pytest.mark.parametrize("recipe", RECOGNISED)
def test_a_few_step_student_is_taken_for_what_its_scheduler_says_and_that_is_said(
    run, micro_pipeline, tmp_path, recipe
):
    scheduler, steps = RECOGNISED[recipe]
    ckpt = folder_with(micro_pipeline, tmp_path / "model", scheduler)
    code, out, err = run("onnx", "--ckpt", ckpt, "--dry-run")
    said = " ".join((out + err).split())
    assert code == 0
    assert f"taken for recipe {recipe} in {steps} by its scheduler" in said
    assert "else say --recipe NAME, or --method tiue or faster" in said


@pytest.mark.parametrize(
    "named", [("--method", "tiue"), ("--method", "faster"), ("--recipe", "hyper-sd-4")]
)
def test_what_is_named_decides(run, micro_pipeline, tmp_path, named):
    denying = DENYING["SD 2.1 with a trailing DDIM"]
    ckpt = folder_with(micro_pipeline, tmp_path / "model", denying)
    assert run("onnx", "--ckpt", ckpt, "--dry-run")[0] == 5
    assert run("onnx", "--ckpt", ckpt, "--dry-run", *named)[0] == 0


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
    assert "a few-step student with --recipe NAME" in said


def test_a_student_that_records_its_k_is_one_whatever_its_scheduler(run, micro_pipeline, tmp_path):
    ckpt = folder_with(
        micro_pipeline, tmp_path / "model", DENYING["SD 2.1 with a trailing DDIM"], tiue_steps=1
    )
    assert run("onnx", "--ckpt", ckpt, "--dry-run")[0] == 0
