"""A training run on disk and the loop on it: killed, interrupted, out of space, resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from tiue_export.errors import CheckpointError, ResourceError, RuntimeFailure, UsageError
from tiue_export.system import atomic_file
from tiue_export.system.atomic_file import write_atomically
from tiue_export.train.loop import train
from tiue_export.train.run_folder import RunFolder

CONFIG = {"seed": 0, "rate": 1e-3, "targets": ("to_q", "to_v")}
STEPS = 7


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and go on."""


class Regression:
    """A small training: a linear map learns random pairs; what step n draws depends on n alone."""

    def __init__(self, run: RunFolder, stop_before: int | None = None) -> None:
        torch.manual_seed(0)
        self.run, self.stop_before = run, stop_before
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.1)
        self.average = EMAModel(self.model.parameters(), decay=0.9)
        self.calls: list[tuple[Any, ...]] = []

    @property
    def parts(self) -> Mapping[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "average": self.average}

    def one_step(self, step: int) -> dict[str, float]:
        if step == self.stop_before:
            raise Killed
        generator = torch.Generator().manual_seed(step)
        inputs, wanted = (
            torch.randn(4, 3, generator=generator),
            torch.randn(4, 2, generator=generator),
        )
        loss = (self.model(inputs) - wanted).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.step(self.model.parameters())
        return {"loss": float(loss.detach()), "step_number": step}

    def train(self, **options: Any) -> Regression:
        options = {"title": "test", "log_every": 1, "save_every": 2, **options}
        train(
            self.run,
            self.parts,
            STEPS,
            options.pop("one_step", self.one_step),
            after_save=lambda done: self.calls.append(("after_save", done)),
            on_log=lambda done, figures: self.calls.append(("on_log", done)),
            on_start=lambda done: self.calls.append(("on_start", done)),
            **options,
        )
        return self

    def weights(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.average.shadow_params]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", CONFIG)


def lines(run: RunFolder) -> list[dict[str, Any]]:
    """The journal without what differs from run to run."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.journal()]


def full_disk(file: Path) -> Path:
    """Every write to `file` meets a full disk: the kernel's own."""
    file.symlink_to("/dev/full")
    return file


# The folder


def test_a_state_comes_back_as_it_was_saved(run):
    run.save(3, model={"w": torch.arange(4.0)}, lists=[torch.ones(1), 2], note="text")
    state = run.load()
    assert (state["step"], state["lists"][1], state["note"]) == (3, 2, "text")
    assert torch.equal(state["model"]["w"], torch.arange(4.0))
    assert sorted(file.name for file in run.path.iterdir()) == [
        "journal.jsonl",
        "run.json",
        "state.pt",
    ]


def test_a_new_run_has_no_state_and_what_was_logged_before_the_first_save_is_dropped(run):
    run.log(1, loss=0.5)
    assert run.load() is None
    assert list(run.journal()) == []


def test_the_same_settings_open_the_run_again(run):
    assert RunFolder(run.path, {**CONFIG, "targets": ["to_q", "to_v"]}).path == run.path


def test_other_settings_are_refused_naming_those_that_differ(run):
    with pytest.raises(UsageError) as caught:
        RunFolder(run.path, {"seed": 1, "rate": 1e-3, "targets": [], "new": True})
    assert caught.value.message == (
        f"{run.path} holds a run with other settings: new was None, is True, seed was 0, is 1, "
        "targets was ['to_q', 'to_v'], is []"
    )
    assert "restore the settings to resume" in caught.value.next_step


def test_a_damaged_run_json_is_named(run):
    (run.path / "run.json").write_text('{"seed": ', "utf-8")
    with pytest.raises(CheckpointError, match=r"run\.json is not JSON: Expecting value"):
        RunFolder(run.path, CONFIG)


def test_resuming_drops_the_journal_beyond_the_state_and_a_line_cut_by_the_kill(run):
    for step in (1, 2, 3):
        run.log(step, loss=1 / step)
    run.save(2, x=1)
    with (run.path / "journal.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [entry["step"] for entry in run.journal()] == [1, 2, 3]
    assert run.load(truncate=False)["step"] == 2
    assert [entry["step"] for entry in run.journal()] == [1, 2, 3]
    run.load()
    assert lines(run) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    run.log(3, loss=0.1)
    assert [entry["step"] for entry in run.journal()] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "no step", "a list"])
def test_a_damaged_state_says_how_to_begin_anew(run, damage):
    run.save(2, x=torch.zeros(1000))
    file = run.path / "state.pt"
    whole = file.read_bytes()
    if damage == "no step":
        torch.save({"x": 1}, file)
    elif damage == "a list":
        torch.save([1], file)
    else:
        parts = {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "text": b"hello",
            "pickle": b"\x80\x02K\x07.",
        }
        file.write_bytes(parts[damage])
    with pytest.raises(CheckpointError) as caught:
        run.load()
    assert caught.value.message.startswith(f"{file} is not a state of a training run: ")
    assert caught.value.next_step == f"Remove {run.path} to train from the start."


def test_a_state_can_run_no_code(run):
    (run.path / "state.pt").write_bytes(b"cos\nsystem\n(S'echo owned'\ntR.")
    with pytest.raises(CheckpointError, match="is not a state of a training run"):
        run.load()


# A full disk


def test_a_save_on_a_full_disk_keeps_the_state_before(run):
    run.save(2, x=torch.zeros(10))
    partial = full_disk(run.path / "state.partial")
    with pytest.raises(ResourceError, match="is full; nothing unfinished was kept"):
        run.save(4, x=torch.zeros(100_000))
    assert not partial.is_symlink()
    assert run.load()["step"] == 2
    run.save(4, x=torch.zeros(100_000))
    assert run.load()["step"] == 4


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_small_and_a_large_state_both_notice_the_full_disk(run, size):
    full_disk(run.path / "state.partial")
    with pytest.raises(ResourceError, match="is full"):
        run.save(1, x=torch.zeros(size))


def test_a_journal_line_on_a_full_disk_is_an_error(run):
    full_disk(run.path / "journal.jsonl")
    with pytest.raises(ResourceError, match="is full"):
        run.log(1, loss=0.5)


def test_a_run_cannot_be_made_on_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    partial = full_disk(tmp_path / "run" / ".run.json.partial")
    monkeypatch.setattr(atomic_file, "owned_path", lambda file, state: partial)
    with pytest.raises(ResourceError, match="is full"):
        RunFolder(tmp_path / "run", CONFIG)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_over_the_size_limit_keeps_the_old_content(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tiue_export.system.atomic_file import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomically(Path(sys.argv[1]), bytes(5000))"
    )
    file = tmp_path / "f"
    write_atomically(file, b"old")
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert file.read_bytes() == b"old"


# Kills and a second process


SAVES_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from tiue_export.train.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]), {"seed": 0})
with run.lock():
    for step in itertools.count(1):
        run.save(step, x=torch.full((500_000,), float(step)))
        if step == 2:
            print("saved", flush=True)
"""


def test_a_kill_amid_saving_leaves_a_whole_state_and_no_lock(tmp_path):
    path = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOR_EVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "saved\n"
    run = RunFolder(path, {"seed": 0})
    with pytest.raises(UsageError) as caught, run.lock():
        raise AssertionError("two processes trained in one folder")
    assert f", process {process.pid} on " in caught.value.message
    assert caught.value.message.endswith(f" is training in {path} at this moment")
    assert caught.value.next_step.startswith("Wait until it has ended")
    time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    state = run.load()
    assert state["step"] >= 2
    assert torch.equal(state["x"], torch.full((500_000,), float(state["step"])))
    with run.lock():
        run.save(1, x=0)
    assert not (path / "state.partial").exists()


def test_a_file_system_without_locks_is_trained_on_all_the_same(run, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(os.strerror(95))

    monkeypatch.setattr("fcntl.flock", unsupported)
    with run.lock():
        run.save(1, x=0)


# The loop


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Regression:
    return Regression(RunFolder(tmp_path_factory.mktemp("unbroken"), CONFIG)).train()


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_stopped_before_any_step_ends_with_the_same_bits(run, unbroken, step):
    with pytest.raises(Killed):
        Regression(run, stop_before=step).train()
    resumed = Regression(run).train()
    for got, wanted in zip(resumed.weights(), unbroken.weights(), strict=True):
        assert torch.equal(got, wanted)
    assert lines(run) == lines(unbroken.run)
    assert run.load()["step"] == STEPS


def test_the_journal_holds_means_over_the_lines_of_steps_and_their_seconds(run):
    Regression(run).train(log_every=3, save_every=6)
    entries = list(run.journal())
    assert [(entry["step"], entry["step_number"]) for entry in entries] == [(3, 1), (6, 4), (7, 6)]
    assert all(entry["seconds"] >= 0 for entry in entries)


def test_the_callbacks_come_in_order(run):
    calls = Regression(run).train(log_every=2, save_every=4).calls
    assert calls == [
        ("on_start", 0),
        ("on_log", 2),
        ("on_log", 4),
        ("after_save", 4),
        ("on_log", 6),
        ("on_log", 7),
        ("after_save", 7),
    ]


def test_what_follows_a_save_is_made_up_for_when_a_kill_came_between(run):
    first = Regression(run)
    with pytest.raises(Killed):
        train(run, first.parts, STEPS, first.one_step, title="test", after_save=_kill, log_every=1)
    assert run.load()["step"] == STEPS
    assert Regression(run).train().calls == [("on_start", STEPS), ("after_save", STEPS)]


def _kill(done: int) -> None:
    raise Killed


def test_a_process_that_does_not_write_only_reads(run):
    with pytest.raises(Killed):
        Regression(run, stop_before=5).train()
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    other = Regression(run)
    other.train(writes=False)
    assert other.calls == []
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before
    for got, wanted in zip(other.weights(), Regression(run).train().weights(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_ends_the_run_and_is_not_saved(run, value):
    def one_step(step: int) -> dict[str, float]:
        return {"loss": value if step == 4 else 1.0}

    with pytest.raises(RuntimeFailure) as caught:
        Regression(run).train(one_step=one_step)
    assert caught.value.message == f"loss became {value} at step 5"
    assert caught.value.next_step.startswith(f"The last good state is in {run.path}; lower the ")
    assert run.load()["step"] == 4


@pytest.mark.parametrize(
    ("at", "kept"), [(5, "the last save is in {path}"), (1, "nothing was saved yet")]
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(run, unbroken, at, kept):
    regression = Regression(run)

    def one_step(step: int) -> dict[str, float]:
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return regression.one_step(step)

    with pytest.raises(KeyboardInterrupt) as caught:
        regression.train(one_step=one_step)
    assert str(caught.value) == (
        f"interrupted after step {at} of {STEPS}; {kept.format(path=run.path)}: "
        "run the same command again to go on"
    )
    for got, wanted in zip(Regression(run).train().weights(), unbroken.weights(), strict=True):
        assert torch.equal(got, wanted)


def test_a_state_of_other_parts_is_refused(run):
    regression = Regression(run)
    run.save(2, model=regression.model.state_dict())
    with pytest.raises(CheckpointError, match=f"the state in {run.path} does not fit this run"):
        regression.train()
    run.save(2, **{**{k: v.state_dict() for k, v in regression.parts.items()}, "model": {}})
    with pytest.raises(CheckpointError, match="does not fit this run: Error"):
        regression.train()


def test_saves_between_two_lines_of_the_journal_are_a_mistake(run):
    with pytest.raises(ValueError, match="save_every 3 is not a multiple of log_every 2"):
        Regression(run).train(log_every=2, save_every=3)


def test_outside_a_terminal_progress_is_plain_lines(run, capsys):
    Regression(run).train(log_every=7, save_every=7)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("test 7/7  loss ")
    assert line.endswith("  0 min left")


def test_a_process_that_does_not_write_says_nothing(run, capsys):
    Regression(run).train(writes=False)
    assert capsys.readouterr() == ("", "")


def test_the_state_holds_the_step_and_one_entry_for_each_part(run):
    Regression(run).train()
    assert set(run.load()) == {"step", "model", "optimizer", "average"}
    assert json.loads((run.path / "run.json").read_text("utf-8"))["rate"] == 1e-3
