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
from safetensors.torch import load_file, save_file

from tiue_export import load_student
from tiue_export.checkpoint.lora_file import read_adapters
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import (
    CheckpointError,
    ScheduleError,
    TiueError,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.export.dry_run import plan_export
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.sampling.key_step_options import FasterOptions
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
        ({"trained_betas": [10**400]}, ScheduleError, "trained_betas are no list of numbers"),
        ({"trained_betas": [2.0] * 1000}, ScheduleError, "trained_betas holds a number that is"),
        ({"beta_end": 1, "steps_offset": 249}, ScheduleError, "give alpha 0 at timestep 999"),
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
        ('{"a": 1e999}', "is not JSON: a number is larger than any that a computer holds"),
        ('{"a": 1, "a": 2}', "is not JSON: the key 'a' stands twice in one object"),
        (r'{"a": "\ud800"}', r"is not JSON: '\ud800' is no text: it holds half a character"),
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


@pytest.mark.parametrize(
    ("part", "change", "kind", "message"),
    [
        ("unet", {"in_channels": [9]}, UnsupportedModelError, "the UNet has [9] input channels"),
        ("unet", {"layers_per_block": [1]}, UnsupportedModelError, "has layers_per_block [1]"),
        ("unet", {"layers_per_block": 10**9}, CheckpointError, "expected at most 1,000,000"),
        ("unet", {"layers_per_block": 10**6}, CheckpointError, "it has more than 1,"),
        ("unet", {"transformer_layers_per_block": 10**6}, CheckpointError, "it has more than 1,"),
        ("unet", {"freq_shift": "x"}, CheckpointError, "describes no network: unsupported operand"),
        ("unet", {"norm_num_groups": "x"}, CheckpointError, "describes no network: "),
        ("unet", {"block_out_channels": [10**29]}, CheckpointError, "expected at most 1,000,"),
        ("vae", {"_class_name": ["a"]}, UnsupportedModelError, "vae holds a ['a']; expected "),
        ("vae", {"num_decoder_blocks": [10**6] * 4}, CheckpointError, "it has more than 1,"),
        ("vae", {"act_fn": "[/red]"}, CheckpointError, "cannot be loaded as AutoencoderTiny: "),
        ("text_encoder", {"num_hidden_layers": 10**6}, CheckpointError, "it has more than 1,"),
        ("text_encoder", {"hidden_act": {}}, CheckpointError, "cannot be loaded as CLIPTextModel"),
    ],
)
def test_a_configuration_that_makes_no_network_is_refused_at_once(
    checkpoint, part, change, kind, message
):
    path = checkpoint / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    error = refusal(checkpoint)
    assert type(error) is kind
    assert message in error.message


def test_a_part_that_computes_nothing_is_told_before_anything_is_written(checkpoint):
    path = checkpoint / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "upsampling_scaling_factor": -1}))
    with pytest.raises(TiueError, match="vae_decoder cannot be computed: ") as caught:
        plan_export(load_student(checkpoint), ExportOptions())
    assert type(caught.value) is UnsupportedModelError


@pytest.mark.parametrize("scheduler", ["dpmpp", "pndm"])
def test_a_schedule_that_diffusers_cannot_make_is_refused(checkpoint, scheduler):
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "timestep_spacing": {"a": 1}}
    with pytest.raises(ScheduleError, match="the scheduler configuration makes no "):
        plan_from_config(config, FasterOptions(scheduler=scheduler))


@pytest.mark.parametrize("number", [2**32 - 1, -1, 10**29, 1.5, "3", None])
def test_a_token_id_that_no_table_holds_is_refused_before_the_library_makes_one(checkpoint, number):
    path = checkpoint / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    token = next(iter(vocabulary))
    path.write_text(json.dumps({**vocabulary, token: number}))
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(checkpoint / "tokenizer", 77)
    said = f"{path}: token {token!r} has the id {str(number)!r}; expected a whole number below"
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"caf\xe9", "adapter_config.json cannot be read: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "adapter_config.json is not JSON: maximum recursion depth"),
        (b'{"lora_alpha": "8"}', "adapter_config.json: lora_alpha is '8'; expected a number"),
        (b'{"lora_alpha": 1e29}', "lora_alpha is '1e+29'; expected a number such as 8"),
        (b'{"lora_alpha": 8, "alpha_pattern": [1]}', "alpha_pattern is no JSON object"),
    ],
)
def test_what_stands_beside_a_lora_is_read_or_refused(tmp_path, text, message):
    path = tmp_path / "lora.safetensors"
    sides = {"lora_down": torch.ones(2, 8), "lora_up": torch.ones(8, 2)}
    save_file({f"lora_unet_a.{side}.weight": each for side, each in sides.items()}, path)
    assert len(read_adapters(path)) == 1
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_adapters(path)
    assert message in caught.value.message


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../unet/model.safetensors", "a/b.safetensors", "", "."]
)
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
