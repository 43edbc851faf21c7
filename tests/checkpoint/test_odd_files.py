"""Files that no honest program writes: each is refused with its own sentence, at once."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiue_export import load_student
from tiue_export.errors import CheckpointError, ScheduleError, TiueError, UsageError
from tiue_export.sampling.noise import noise_from_file

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(micro_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(micro_pipeline, tmp_path / "student"))


def refusal(checkpoint: Path) -> TiueError:
    with pytest.raises(TiueError) as caught:
        load_student(checkpoint)
    return caught.value


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"steps_offset": float("nan")}, CheckpointError, "NaN is no number that JSON knows"),
        ({"steps_offset": -float("inf")}, CheckpointError, "-Infinity is no number"),
        ({"num_train_timesteps": 10**29}, ScheduleError, "expected a number from 1 to 100000"),
        ({"num_train_timesteps": 0}, ScheduleError, "num_train_timesteps is '0'; expected"),
        ({"beta_start": -4}, ScheduleError, "beta_start is '-4'; expected a number from 0 to 1"),
        ({"trained_betas": "x"}, ScheduleError, "trained_betas are no list of numbers"),
        ({"trained_betas": {"a": 1}}, ScheduleError, "trained_betas are no list of numbers"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_its_key(checkpoint, change, kind, message):
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    error = refusal(checkpoint)
    assert type(error) is kind
    assert message in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_configuration_that_is_no_json_object_is_refused(checkpoint, text, message):
    (checkpoint / "vae" / "config.json").write_text(text)
    error = refusal(checkpoint)
    assert type(error) is CheckpointError
    assert message in error.message


def test_a_named_pipe_is_not_waited_for(checkpoint, tmp_path):
    path = checkpoint / "vae" / "config.json"
    path.unlink()
    os.mkfifo(path)
    assert refusal(checkpoint).message == f"{path} is no file"
    os.mkfifo(tmp_path / "noise.npy")
    with pytest.raises(
        UsageError, match=r"noise\.npy cannot be read as an \.npy array: it is no file"
    ):
        noise_from_file(tmp_path / "noise.npy", (1, 4, 8, 8))


@pytest.mark.parametrize("shard", ["/etc/passwd", "../unet/model.safetensors", "a/b.safetensors"])
def test_a_shard_index_names_files_beside_it_alone(checkpoint, shard):
    weights = checkpoint / WEIGHTS
    weights.rename(weights.with_name("kept.safetensors"))
    index = weights.with_name(f"{weights.name}.index.json")
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    message = f"{index} names {shard!r} as a shard; expected a file beside it"
    assert refusal(checkpoint).message == message


def test_the_conversion_that_is_printed_for_a_pickled_part_leads_out(checkpoint):
    safe = checkpoint / "text_encoder" / "model.safetensors"
    torch.save(load_file(safe), safe.with_name("pytorch_model.bin"))
    safe.unlink()
    error = refusal(checkpoint)
    assert "is a pickle, which can run any code" in error.message
    line = error.next_step.splitlines()[-1].strip().replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, check=True)
    assert load_student(checkpoint).text_encoder is not None


def test_an_infinite_offset_is_no_header(checkpoint):
    path = checkpoint / WEIGHTS
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, float("inf")]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + size :])
    assert "its header is not the JSON that it should be" in refusal(checkpoint).message
