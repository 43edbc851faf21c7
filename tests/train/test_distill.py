"""Distillation from end to end on the tiny family: trained, killed, resumed, shared, refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tiue_export import export_onnx, load_student
from tiue_export.errors import (
    RuntimeFailure,
    ScheduleError,
    UsageError,
)
from tiue_export.sampling.fan_out import FanOut
from tiue_export.system.install import install_line
from tiue_export.train.config import DistillConfig
from tiue_export.train.distill import distill
from tiue_export.train.networks import load_networks
from tiue_export.train.score_networks import (
    without_adapters,
)

STEPS = 4
FIGURES = {"loss", "noise_kl", "vsd_gradient_rms", "gradient_norm", "fake_score"}


@pytest.fixture(scope="session")
def unbroken(tiny_distillation: DistillConfig) -> Path:
    """The run folder of `tiny_distillation`, trained without a break."""
    distill(tiny_distillation)
    return Path(tiny_distillation.out)


def as_toml(file: Path, config: DistillConfig) -> Path:
    """`config` as a user writes it, without what is a default."""
    default = DistillConfig(teacher="", prompts="", out="")
    changed = {
        field: getattr(config, field)
        for field in config.__dataclass_fields__
        if getattr(config, field) != getattr(default, field)
    }
    lines = [
        f"{k} = {json.dumps(list(v) if isinstance(v, tuple) else v)}" for k, v in changed.items()
    ]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def student_sha256(out: Path) -> str:
    file = out / "student" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def journal(out: Path) -> list[dict[str, float]]:
    """The journal without what differs from run to run."""
    lines = (out / "journal.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "state.pt", weights_only=True)


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].double().flatten() for name in sorted(weights)])


def assert_trained_alike(out: Path, reference: Path, start: Tensor, iterations: int) -> None:
    """Same figures, and the same way travelled from `start`, up to the order of float sums."""
    for got, wanted in zip(journal(out), journal(reference)[:iterations], strict=True):
        assert got == pytest.approx(wanted, rel=2e-3, abs=1e-5)
    ways = [flat(state(path)["student"]) - start for path in (out, reference)]
    # Adam's first steps are signs of gradients: where those are rounding noise, weights may differ.
    assert float((ways[0] - ways[1]).norm() / ways[1].norm()) < 0.05


@pytest.fixture(scope="module")
def start(tiny_distillation: DistillConfig) -> Tensor:
    """The weights that a student starts with."""
    return flat(load_student(tiny_distillation.teacher).unet.state_dict())


# A whole run


def test_a_run_leaves_a_student_that_every_command_takes_and_that_records_its_k(
    unbroken, tiny_distillation
):
    student = load_student(unbroken / "student")
    assert (student.plan.steps, student.source.dtype) == (4, "float16")
    assert student.plan.timesteps == (751, 501, 251, 1)
    with pytest.raises(ScheduleError, match="trained for K=4"):
        load_student(unbroken / "student", steps=2)
    teacher = load_student(tiny_distillation.teacher)
    moved = flat(student.unet.state_dict()) - flat(teacher.unet.half().state_dict())
    assert float(moved.abs().max()) > 1e-4
    for part in ("text_encoder", "vae"):
        got, wanted = getattr(student, part).state_dict(), getattr(teacher, part).state_dict()
        assert all(torch.equal(got[name], wanted[name].half()) for name in wanted)


def test_the_written_student_is_the_average_and_the_state_holds_both(unbroken):
    saved = state(unbroken)
    names = list(load_student(unbroken / "student").unet.state_dict())
    averaged = dict(zip(names, saved["average"]["shadow_params"], strict=True))
    written = load_student(unbroken / "student").unet.state_dict()
    assert all(torch.equal(written[name], averaged[name].half()) for name in names)
    raw = {name.removeprefix("unet."): value for name, value in saved["student"].items()}
    assert not torch.equal(flat(raw), flat(averaged))
    assert set(saved) == {
        "step",
        "student",
        "fake_score",
        "student_optimizer",
        "fake_optimizer",
        "average",
    }
    assert {value.dtype for value in raw.values()} == {torch.float32}


def test_a_run_leaves_its_journal_its_curves_and_its_pictures(unbroken, tiny_distillation):
    lines = journal(unbroken)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(set(line) == FIGURES | {"step"} for line in lines)
    # The fake score starts as the teacher, so the first step has nothing to learn from it.
    assert lines[0]["vsd_gradient_rms"] == 0
    assert lines[1]["vsd_gradient_rms"] > 0
    for step in (2, 4):
        with Image.open(unbroken / "samples" / f"step-{step:06d}.png") as picture:
            assert picture.size == (2 * 64, 2 * 64)
    assert curves(unbroken)["loss"] == pytest.approx({line["step"]: line["loss"] for line in lines})


def curves(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: tag -> step -> value; a step drawn twice is an error."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len(points) == len(dict(points)), f"{tag} has a step twice: {points}"
        shown[tag] = dict(points)
    return shown


# Kills


def test_a_run_killed_in_the_middle_and_resumed_ends_with_the_same_bits(
    unbroken, tiny_distillation, tmp_path
):
    config = replace(tiny_distillation, out=str(tmp_path / "run"))
    command = [sys.executable, "-m", "tiue_export", "distill", as_toml(tmp_path / "c.toml", config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = tmp_path / "run" / "journal.jsonl"
    while process.poll() is None and not (
        lines.is_file() and len(lines.read_bytes().splitlines()) >= 3
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"

    distill(config)
    assert student_sha256(tmp_path / "run") == student_sha256(unbroken)
    assert journal(tmp_path / "run") == journal(unbroken)
    assert curves(tmp_path / "run") == curves(unbroken)
    resumed = state(tmp_path / "run")["student"]
    for name, value in state(unbroken)["student"].items():
        assert torch.equal(resumed[name], value)
    pictures = [f"samples/step-{step:06d}.png" for step in (2, 4)]
    for picture in pictures:
        assert (tmp_path / "run" / picture).read_bytes() == (unbroken / picture).read_bytes()


def test_a_finished_run_has_nothing_left_to_do_but_what_a_kill_kept_from_it(
    unbroken, tiny_distillation, tmp_path
):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(out / "student")
    distill(replace(tiny_distillation, out=str(out)))
    assert student_sha256(out) == student_sha256(unbroken)
    assert journal(out) == journal(unbroken)


def test_a_run_may_be_made_longer_and_be_moved(unbroken, tiny_distillation, tmp_path):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    teacher = shutil.copytree(tiny_distillation.teacher, tmp_path / "moved-teacher")
    prompts = shutil.copy(tiny_distillation.prompts, tmp_path / "moved.txt")
    moved = replace(tiny_distillation, teacher=str(teacher), prompts=str(prompts), out=str(out))
    distill(replace(moved, iterations=STEPS + 1, micro_batch=2))
    assert state(out)["step"] == STEPS + 1
    assert [line["step"] for line in journal(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("change", ["seed", "prompts", "teacher"])
def test_a_run_is_not_resumed_with_other_settings_prompts_or_weights(
    unbroken, tiny_distillation, change, tmp_path
):
    out = Path(shutil.copytree(unbroken, tmp_path / "run"))
    config = replace(tiny_distillation, out=str(out))
    if change == "seed":
        config = replace(config, seed=1)
    elif change == "prompts":
        (tmp_path / "p.txt").write_text(
            "\n".join(f"prompt {number}" for number in range(6)), "utf-8"
        )
        config = replace(config, prompts=str(tmp_path / "p.txt"))
    else:
        config = replace(config, teacher=str(unbroken / "student"))
    with pytest.raises(UsageError, match=f"run holds a run with other settings: .*{change}"):
        distill(config)
    assert student_sha256(out) == student_sha256(unbroken)


def test_a_student_folder_that_no_training_made_is_not_replaced(tiny_distillation, tmp_path):
    teacher = Path(shutil.copytree(tiny_distillation.teacher, tmp_path / "run" / "student"))
    with pytest.raises(UsageError, match="has a student/ that no training made"):
        distill(replace(tiny_distillation, teacher=str(teacher), out=str(tmp_path / "run")))
    assert (teacher / "model_index.json").is_file()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["student"]


# The same step, computed otherwise


def test_accumulated_micro_batches_train_as_one_batch(unbroken, tiny_distillation, start, tmp_path):
    config = replace(
        tiny_distillation,
        out=str(tmp_path / "run"),
        iterations=2,
        micro_batch=3,  # 3 + 1 samples
        gradient_checkpointing=False,
        channels_last=False,
    )
    distill(config)
    reference = replace(tiny_distillation, out=str(tmp_path / "reference"), iterations=2)
    distill(reference)
    assert_trained_alike(tmp_path / "run", tmp_path / "reference", start, 2)
    assert journal(tmp_path / "reference") == journal(unbroken)[:2]


TWO_PROCESSES = """
import os, sys
from dataclasses import replace
from pathlib import Path
from tiue_export.apps.cli import main
from tiue_export.errors import UsageError
from tiue_export.train.config import read_config
from tiue_export.train.distill import distill
config = read_config(Path(sys.argv[1]))
try:
    distill(replace(config, out=f"{config.out}-of-{os.environ['RANK']}"))
except UsageError as error:
    print(error.message)
main(["distill", sys.argv[1]])
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(tiny_distillation, start, tmp_path):
    config = replace(tiny_distillation, out=str(tmp_path / "run"), iterations=2, micro_batch=1)
    (tmp_path / "two.py").write_text(TWO_PROCESSES, "utf-8")
    (tmp_path / "run-of-1").mkdir()
    (tmp_path / "run-of-1" / "state.pt").write_bytes(b"of another run")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    file = as_toml(tmp_path / "c.toml", config)
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py"), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Each was first given a folder of its own, as on two machines that share no disk.
    for rank in (0, 1):
        assert f"different states in {tmp_path}/run-of-{rank}" in done.stdout
    assert done.stdout.count(f"Trained. {tmp_path}/run/student") == 1
    assert done.stderr.count("loading the teacher") == 1

    reference = replace(tiny_distillation, out=str(tmp_path / "reference"), iterations=2)
    distill(reference)
    assert_trained_alike(tmp_path / "run", tmp_path / "reference", start, 2)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_keeps_weights_in_float32_and_comes_near_fp32(
    tiny_distillation, unbroken, tmp_path, monkeypatch, native
):
    monkeypatch.setattr("tiue_export.train.distill.has_native_bf16", lambda: native)
    config = replace(tiny_distillation, out=str(tmp_path / "run"), precision="bf16", iterations=2)
    told: list[str] = []
    distill(config, told.append)
    # Without bf16 instructions PyTorch computes all the same, many times slower: said, not hidden.
    assert native == (not any('precision = "fp32" is many times faster' in line for line in told))
    assert {value.dtype for value in state(tmp_path / "run")["student"].values()} == {torch.float32}
    assert {value.dtype for value in state(tmp_path / "run")["fake_score"]} == {torch.float32}
    got, wanted = journal(tmp_path / "run"), journal(unbroken)[:2]
    for line, exact in zip(got, wanted, strict=True):
        assert line["noise_kl"] == pytest.approx(exact["noise_kl"], rel=0.02)
        assert line["fake_score"] == pytest.approx(exact["fake_score"], rel=0.05)
    # The first step has no score difference in any precision: teacher and fake score are one.
    assert got[0]["vsd_gradient_rms"] == 0
    load_student(tmp_path / "run" / "student")


# Other students


def test_a_one_step_student_trains_and_exports_like_any_other(tiny_distillation, tmp_path):
    config = replace(
        tiny_distillation,
        method="one-step",
        steps=1,
        kl_weight=0.0,
        iterations=2,
        out=str(tmp_path / "run"),
    )
    student = distill(config)
    assert all("noise_kl" not in line for line in journal(tmp_path / "run"))
    trained = load_student(student)
    assert trained.plan.timesteps == (999,)
    trained.text_encoder = trained.vae = None
    manifest = export_onnx(trained, tmp_path / "bundle").manifest
    assert (manifest.plan.steps, manifest.plan.timesteps) == (1, (999,))


def test_a_student_of_another_k_is_started_from_a_trained_one(
    unbroken, tiny_distillation, tmp_path
):
    config = replace(
        tiny_distillation, steps=2, student=str(unbroken / "student"), out=str(tmp_path / "run")
    )
    loaded = load_networks(config, torch.device("cpu"))
    trained = load_student(unbroken / "student").unet.state_dict()
    started = loaded.student.unet.state_dict()
    assert all(torch.equal(started[name], value.float()) for name, value in trained.items())
    assert loaded.student.plan.timesteps == (501, 1)
    # Its teacher stays the teacher.
    with without_adapters(loaded.teacher):
        assert torch.equal(
            loaded.teacher.conv_in.weight,
            load_student(tiny_distillation.teacher).unet.conv_in.weight,
        )
    student = distill(replace(config, iterations=1, save_every=1, sample_every=1, fan_out="1"))
    assert load_student(student).plan.steps == 2
    # What it learned is recorded, and kept by a training that goes on from it.
    assert load_student(student).plan.fan_out == FanOut(1)
    again = load_networks(replace(config, student=str(student)), torch.device("cpu"))
    assert again.student.plan.fan_out == FanOut(1)


# What cannot be trained


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 trains on a GPU")
def test_fp16_without_a_gpu_is_refused(tiny_distillation, tmp_path):
    with pytest.raises(UsageError, match="precision is fp16, which trains on GPUs only") as caught:
        distill(replace(tiny_distillation, precision="fp16", out=str(tmp_path / "run")))
    assert caught.value.next_step == 'Set precision = "bf16" or "fp32".'


def test_a_loss_that_is_not_finite_ends_the_run(tiny_distillation, tmp_path):
    with pytest.raises(RuntimeFailure, match=r"became (nan|inf) at step"):
        distill(
            replace(
                tiny_distillation,
                out=str(tmp_path / "run"),
                student_learning_rate=1e12,
                iterations=6,
            )
        )


# The command line


def test_the_presets_are_listed(run):
    code, out, err = run("distill", "--presets")
    assert (code, err) == (0, "")
    assert {"sd21-base", "swiftbrush"} <= set(out.split())
    code, out, _ = run("distill", "--presets", "--json")
    assert (code, "sd15" in json.loads(out)) == (0, True)


def test_without_a_file_the_command_says_what_to_type(run):
    code, _, err = run("distill")
    assert code == 2
    assert "no configuration was given" in err
    assert "tiue-export distill CONFIG.toml; --presets lists" in err


def test_a_missing_file_and_a_missing_teacher_end_with_2(run, tiny_distillation, tmp_path):
    code, _, err = run("distill", tmp_path / "none.toml")
    assert (code, "none.toml is not there" in err) == (2, True)
    config = as_toml(
        tmp_path / "c.toml", replace(tiny_distillation, teacher=str(tmp_path / "nothing"))
    )
    code, _, err = run("distill", config)
    assert (code, "nothing does not exist" in err) == (2, True)
    assert "Traceback" not in err


def test_the_command_trains_with_overrides_and_prints_what_to_type_next(
    run, tiny_distillation, tmp_path
):
    file = as_toml(tmp_path / "c.toml", replace(tiny_distillation, save_every=1, sample_every=1))
    code, out, err = run("distill", file, "--out", tmp_path / "here", "--iterations", 1)
    assert code == 0, err
    assert out.splitlines() == [
        f"Trained. {tmp_path}/here/student",
        f"  tiue-export onnx --ckpt {tmp_path}/here/student",
        f"  tensorboard --logdir {tmp_path}/here",
    ]
    assert "loading the teacher ..." in err
    assert "tiue 1/1  " in err
    code, out, _ = run("distill", file, "--out", tmp_path / "here", "--iterations", 1, "--json")
    assert code == 0
    assert json.loads(out) == {
        "student": f"{tmp_path}/here/student",
        "run": f"{tmp_path}/here",
        "iterations": 1,
    }


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(run, tiny_distillation, tmp_path):
    config = replace(tiny_distillation, out=str(tmp_path / "run"), iterations=500)
    saved = tmp_path / "run" / "state.pt"

    def interrupt() -> None:
        while not saved.is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    code, _, err = run("distill", as_toml(tmp_path / "c.toml", config))
    assert code == 130
    assert "error: interrupted after step " in err
    assert f"the last save is in {tmp_path}/run: run the same command again to go on" in err


def test_without_the_extra_the_command_names_the_pip_line(run, monkeypatch):
    registry = importlib.import_module("tiue_export.registry.packages")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda n, *a: None if n == "peft" else found(n, *a)
    )
    code, _, err = run("distill", "c.toml")
    assert code == 8
    assert "distillation needs peft, which is not installed" in err
    assert install_line("train") in err


def test_a_student_of_sdxl_is_trained_and_written_as_a_pipeline_of_its_own(
    tiny_distillation, sdxl_folder, tmp_path
):
    config = replace(
        tiny_distillation,
        teacher=str(sdxl_folder),
        out=str(tmp_path / "run"),
        iterations=2,
        save_every=2,
        sample_every=2,
    )
    distill(config)
    student = load_student(tmp_path / "run" / "student")
    teacher = load_student(sdxl_folder, steps=STEPS)
    assert (student.plan.method, student.plan.rows) == ("tiue", STEPS)
    assert student.source.parts["text_encoder_2"] == "checkpoint"
    layer = "add_embedding.linear_1.weight"
    moved = student.unet.get_parameter(layer).float() - teacher.unet.get_parameter(layer)
    assert 0 < moved.abs().max() < 0.1
