"""A pipeline folder is written whole or not at all, and every command can read it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiue_export import load_student
from tiue_export.errors import ResourceError, ScheduleError, UsageError
from tiue_export.student.pipeline_folder import write_pipeline


@pytest.fixture
def parts(tiny_student) -> dict[str, Any]:
    return {
        "unet": tiny_student.unet,
        "text_encoder": tiny_student.text_encoder,
        "vae": tiny_student.vae,
        "tokenizer": tiny_student.tokenizer_folder,
        "scheduler_config": tiny_student.scheduler_config,
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read_back_in_its_precision_with_its_k(parts, tiny_student, tmp_path):
    folder = write_pipeline(tmp_path / "s", **parts, steps=8, licence="apache-2.0")
    read = load_student(folder)
    assert (read.plan.steps, read.source.dtype) == (8, "float16")
    for got, wanted in zip(read.parameters(), tiny_student.parameters(), strict=True):
        assert torch.equal(got, wanted.half())
    with pytest.raises(ScheduleError, match="trained for K=8"):
        load_student(folder, steps=4)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    assert (index["license"], index["vae"]) == ("apache-2.0", ["diffusers", "AutoencoderKL"])
    assert names(tmp_path) == ["s"]


def test_a_teacher_records_no_k(parts, tmp_path):
    folder = write_pipeline(tmp_path / "t", **parts, dtype=torch.float32)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert "tiue_steps" not in config
    assert load_student(folder, steps=2).plan.steps == 2


def test_the_models_that_are_written_stay_as_they_are(parts, tmp_path):
    write_pipeline(tmp_path / "s", **parts)
    assert {p.dtype for p in parts["unet"].parameters()} == {torch.float32}


def test_weights_in_channels_last_order_are_written_all_the_same(parts, tiny_student, tmp_path):
    unet = load_student(tiny_student.tokenizer_folder.parent).unet
    unet.to(memory_format=torch.channels_last)
    folder = write_pipeline(tmp_path / "s", **{**parts, "unet": unet}, dtype=torch.float32)
    read = load_student(folder).unet.state_dict()
    assert all(torch.equal(read[name], value) for name, value in unet.state_dict().items())


def test_an_existing_folder_is_replaced_only_when_asked(parts, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("kept")
    with pytest.raises(UsageError, match=r"s exists") as caught:
        write_pipeline(tmp_path / "s", **parts)
    assert caught.value.next_step == "Choose another output or pass --force."
    assert names(tmp_path / "s") == ["mine"]
    write_pipeline(tmp_path / "s", **parts, force=True)
    assert "mine" not in names(tmp_path / "s")
    assert names(tmp_path) == ["s"]


def test_a_failure_keeps_what_was_there_and_leaves_nothing_beside_it(parts, tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(FileNotFoundError):
        write_pipeline(tmp_path / "s", **{**parts, "tokenizer": tmp_path / "none"}, force=True)
    assert names(tmp_path) == ["s"]
    assert names(tmp_path / "s") == []


def test_what_a_killed_process_left_is_cleared_away(parts, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tiue_export.system.owned_path import owned_path\n"
        "for state in ('partial', 'replaced'): owned_path(Path(sys.argv[1]), state).mkdir()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=True)
    assert len(names(tmp_path)) == 2
    (tmp_path / "s").mkdir()
    write_pipeline(tmp_path / "s", **parts, force=True)
    assert names(tmp_path) == ["s"]
    load_student(tmp_path / "s")


def test_a_full_disk_says_so_and_keeps_the_old_folder(parts, tmp_path):
    """A real file system of 300 kB; needs root for the mount."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        (small / "s").mkdir()
        with pytest.raises(ResourceError, match="is full; nothing unfinished was kept"):
            write_pipeline(small / "s", **parts, force=True)
        assert names(small) == ["s"]
        assert shutil.disk_usage(small).used < 10_000
    finally:
        subprocess.run(["umount", str(small)], check=True)
