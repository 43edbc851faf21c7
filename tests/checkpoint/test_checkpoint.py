"""Every accepted form of a checkpoint is the same student; every damaged one is explained."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from micro_models import micro_unet
from safetensors.torch import load_file, save_file

from tiue_export import load_student
from tiue_export.benchmarks.synthetic import write_ldm_file
from tiue_export.checkpoint.container import check_container
from tiue_export.checkpoint.family import family_names, load_family
from tiue_export.checkpoint.ldm_names import (
    LDM_PREFIX,
    ldm_module_names,
    ldm_names,
    ldm_spellings,
)
from tiue_export.errors import (
    CheckpointError,
    ScheduleError,
    TiueError,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.sampling.ddim import one_pass_plan


@pytest.fixture(scope="module")
def unet_tensors(tiny_pipeline: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


def state(student) -> dict[str, torch.Tensor]:
    return dict(student.unet.state_dict())


def assert_same_weights(a, b) -> None:
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- accepted forms


@pytest.mark.parametrize(
    "prefix", ["", "unet.", "module.", "student.", "_orig_mod.", "module._orig_mod.unet."]
)
def test_a_single_file_loads_with_any_wrapper_prefix(
    prefix, unet_tensors, tiny_pipeline, tiny_student, tmp_path
):
    file = tmp_path / "student.safetensors"
    save_file({prefix + name: tensor for name, tensor in unet_tensors.items()}, file)
    student = load_student(file, base=tiny_pipeline)
    assert_same_weights(student, tiny_student)
    assert student.source.layout == "diffusers"
    assert any("which was removed" in note for note in student.source.notes) == bool(prefix)
    assert "records no K" in student.source.notes[-1]


def test_an_ldm_file_loads_as_the_same_student(tiny_pipeline, tiny_student, tmp_path):
    file = write_ldm_file(tiny_pipeline, tmp_path / "ldm.safetensors")
    student = load_student(file, base=tiny_pipeline)
    assert_same_weights(student, tiny_student)
    assert (student.source.layout, student.source.family) == ("ldm", "tiny")


def test_ema_weights_of_an_ldm_file_are_preferred_and_the_rest_is_noted(
    tiny_pipeline, tiny_student, tmp_path
):
    file = write_ldm_file(tiny_pipeline, tmp_path / "ldm.safetensors")
    averaged = load_file(file)
    both = {name: torch.zeros_like(tensor) for name, tensor in averaged.items()}
    for name, tensor in averaged.items():
        flat = name.removeprefix("model.").replace(".", "")
        # LitEma drops the dots after "diffusion_model" too: diffusion_modelinput_blocks00weight.
        both["model_ema." + flat.replace("diffusion_model", "diffusion_model", 1)] = tensor
    both["model_ema.decay"] = torch.tensor(0.999)
    both["alphas_cumprod"] = torch.zeros(1)
    save_file(both, file)
    student = load_student(file, base=tiny_pipeline)
    assert_same_weights(student, tiny_student)
    assert student.source.ema
    assert "EMA" in student.source.notes[0]
    assert "1 tensors of no part were left" in student.source.notes[1]


def test_a_unet_folder_and_a_pipeline_folder_load_alike(tiny_pipeline, tiny_student):
    student = load_student(tiny_pipeline / "unet", base=tiny_pipeline)
    assert_same_weights(student, tiny_student)
    assert student.source.parts["vae"] == "base pipeline"
    assert tiny_student.source.parts["vae"] == "checkpoint"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_checkpoints_own_dtype_is_kept(dtype, unet_tensors, tiny_pipeline, tmp_path):
    file = tmp_path / "student.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in unet_tensors.items()}, file)
    student = load_student(file, base=tiny_pipeline)
    assert {p.dtype for p in student.unet.parameters()} == {dtype}
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert torch.isfinite(student.sample(noise, text)).all()


def test_mixed_dtypes_become_float32(unet_tensors, tiny_pipeline, tmp_path):
    file = tmp_path / "student.safetensors"
    halves = {n: t.half() if "conv" in n else t for n, t in unet_tensors.items()}
    save_file(halves, file)
    student = load_student(file, base=tiny_pipeline)
    assert {p.dtype for p in student.unet.parameters()} == {torch.float32}


def test_sharded_weights_are_put_together(pipeline, unet_tensors, tiny_student):
    folder = pipeline / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(unet_tensors)
    shards = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    for shard, part in shards.items():
        save_file({name: unet_tensors[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_weights(load_student(pipeline), tiny_student)


def test_an_fp16_variant_file_is_found(pipeline):
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        plain = pipeline / part / f"{stem}.safetensors"
        plain.rename(pipeline / part / f"{stem}.fp16.safetensors")
    assert load_student(pipeline).vae is not None


def test_a_bare_unet_without_base_has_no_text_encoder_and_the_familys_scheduler(
    unet_tensors, tmp_path
):
    file = tmp_path / "student.safetensors"
    save_file(unet_tensors, file)
    student = load_student(file)
    assert student.text_encoder is None
    assert student.vae is None
    assert student.plan.timesteps == (751, 501, 251, 1)
    assert set(student.source.parts.values()) == {"none"}


def test_old_text_encoder_checkpoints_with_a_prefix_and_position_ids_load(pipeline):
    file = pipeline / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    expected = load_student(pipeline).text_encoder.state_dict()
    save_file(tensors, file, metadata={"format": "pt"})
    found = load_student(pipeline).text_encoder.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def tiny_vae(micro_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(micro_pipeline / "vae", tmp_path / "taesd"))


def test_a_tiny_autoencoder_is_accepted(pipeline, tiny_vae):
    shutil.rmtree(pipeline / "vae")
    shutil.copytree(tiny_vae, pipeline / "vae")
    assert type(load_student(pipeline).vae).__name__ == "AutoencoderTiny"


@pytest.mark.parametrize("prefix", ["", "tiny:"])
def test_another_vae_replaces_the_checkpoints_own_and_the_source_says_so(
    tiny_pipeline, tiny_vae, prefix
):
    own, other = (load_student(tiny_pipeline, vae=v) for v in (None, f"{prefix}{tiny_vae}"))
    assert type(own.vae).__name__ == "AutoencoderKL"
    assert type(other.vae).__name__ == "AutoencoderTiny"
    assert other.source.parts["vae"] == "--vae taesd"
    assert other.source.part_sha256["vae"] != own.source.part_sha256["vae"]
    assert other.source.sha256 == own.source.sha256


def test_the_vae_of_a_pipeline_folder_can_be_taken_by_that_folders_name(pipeline, tiny_pipeline):
    student = load_student(tiny_pipeline, vae=pipeline)
    assert student.source.parts["vae"] == "--vae vae"


def test_a_folder_without_a_vae_is_refused_with_what_to_give(tiny_pipeline, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"neither a file nor a folder with config\.json"
    ) as caught:
        load_student(tiny_pipeline, vae=f"tiny:{tmp_path}")
    assert "madebyollin/taesd" in str(caught.value.next_step)


def test_tiny_insists_on_a_tiny_autoencoder(tiny_pipeline):
    with pytest.raises(UnsupportedModelError, match="holds a AutoencoderKL; tiny: expects"):
        load_student(tiny_pipeline, vae=f"tiny:{tiny_pipeline / 'vae'}")


# --- K


def test_the_recorded_k_is_kept_and_another_refused_unless_forced(tiny_pipeline):
    assert load_student(tiny_pipeline).plan.steps == 4
    with pytest.raises(ScheduleError, match="trained for K=4, --steps asks for 8"):
        load_student(tiny_pipeline, steps=8)
    assert load_student(tiny_pipeline, steps=8, allow_other_steps=True).plan.steps == 8


def test_k_recorded_in_the_files_metadata_is_kept(unet_tensors, tmp_path):
    file = tmp_path / "student.safetensors"
    save_file(unet_tensors, file, metadata={"tiue_steps": "8"})
    assert load_student(file).plan.steps == 8


def test_an_unrecorded_k_follows_the_option_and_defaults_to_four(unet_tensors, tmp_path):
    file = tmp_path / "student.safetensors"
    save_file(unet_tensors, file)
    assert load_student(file).plan.steps == 4
    assert load_student(file, steps=16).plan.rows == 16


# --- damaged or foreign


def refused(kind: type[TiueError], path: Path, *parts: str, **options: object) -> str:
    with pytest.raises(kind) as caught:
        load_student(path, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


def saved(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    file = tmp_path / "student.safetensors"
    save_file(tensors, file)
    return file


def test_a_truncated_file_says_how_much_is_missing(unet_tensors, tmp_path):
    file = saved(unet_tensors, tmp_path)
    whole = file.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 200, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            load_student(file)
        text = str(caught.value)
        assert "truncated" in text or "no safetensors file" in text


def test_a_pickle_is_refused_whatever_its_name_and_the_conversion_line_works(
    unet_tensors, tmp_path
):
    lines = {}
    for name in ("m.ckpt", "m.pt", "m.bin", "m.pth", "disguised.safetensors"):
        torch.save({"state_dict": unet_tensors}, tmp_path / name)
        message = refused(CheckpointError, tmp_path / name, "is a pickle, which can run any code")
        lines[name] = message.splitlines()[-1].strip()
    for name in ("m.pt", "m.bin", "m.pth"):
        assert lines[name] == lines["m.ckpt"].replace("m.ckpt", name)
    for name in ("m.ckpt", "disguised.safetensors"):
        line = lines[name].replace("python", sys.executable, 1)
        subprocess.run(line, shell=True, check=True)
        assert load_student(line.split()[-1]).source.family == "tiny"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # its process would end
def test_a_pickled_part_of_a_pipeline_is_converted_to_what_the_loader_reads(pipeline, monkeypatch):
    weights = pipeline / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    torch.save({}, weights.with_name("optimizer.bin"))
    message = refused(CheckpointError, pipeline, "pytorch_model.bin is a pickle")
    program, _, code, *arguments = shlex.split(message.splitlines()[-1])
    assert program == "python"
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(code, {})
    assert load_student(pipeline).text_encoder is not None


@pytest.mark.parametrize("first_two", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"])
def test_a_safetensors_file_whose_size_begins_like_a_pickle_is_read(tmp_path, first_two):
    size = int.from_bytes(first_two, "little")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(size)
    file = tmp_path / "unlucky.safetensors"
    file.write_bytes(size.to_bytes(8, "little") + header + bytes(4))
    check_container(file)


def test_a_folder_with_pickled_weights_only_is_refused(pipeline):
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(CheckpointError, pipeline, "diffusion_pytorch_model.bin is a pickle")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(value, unet_tensors, tmp_path):
    broken = {name: tensor.clone() for name, tensor in unet_tensors.items()}
    broken["mid_block.resnets.1.conv2.weight"][0, 0, 0, 0] = value
    refused(
        CheckpointError,
        saved(broken, tmp_path),
        "1 with NaN or infinite weights: mid_block.resnets.1.conv2.weight",
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_non_finite_weights_in_other_parts_are_named_too(part, pipeline):
    file = next((pipeline / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(CheckpointError, pipeline, "NaN or infinite", name.removeprefix("text_model."))


def test_missing_extra_and_misshaped_tensors_are_listed_with_counts(unet_tensors, tmp_path):
    names = [name for name in sorted(unet_tensors) if name != "conv_out.bias"]
    changed = {name: tensor for name, tensor in unet_tensors.items() if name not in names[:12]}
    changed |= {f"extra.{i}": torch.zeros(1) for i in range(3)}
    changed["conv_out.bias"] = torch.zeros(7)
    message = refused(
        CheckpointError,
        saved(changed, tmp_path),
        "12 missing: ",
        "and 2 more",
        "3 unexpected: extra.0, extra.1, extra.2",
        "1 of another shape: conv_out.bias is (7,), expected (4,)",
        family="tiny",
    )
    assert names[0] in message


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_missing_tensors_of_other_parts_are_errors_not_random_weights(part, pipeline):
    file = next((pipeline / part).glob("*.safetensors"))
    tensors = load_file(file)
    dropped = next(
        n for n in sorted(tensors) if n.endswith("weight") and "decoder" in n + "decoder"
    )
    del tensors[dropped]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(CheckpointError, pipeline, "missing")


def test_an_ldm_file_with_an_unknown_tensor_names_it(tiny_pipeline, tmp_path):
    file = write_ldm_file(tiny_pipeline, tmp_path / "ldm.safetensors")
    tensors = load_file(file)
    tensors[LDM_PREFIX + "input_blocks.99.0.weight"] = torch.zeros(1)
    save_file(tensors, file)
    refused(CheckpointError, file, "1 unexpected: input_blocks.99.0.weight", base=tiny_pipeline)


def test_quantized_weights_are_refused(unet_tensors, tmp_path):
    changed = dict(unet_tensors)
    changed["conv_in.weight"] = changed["conv_in.weight"].to(torch.float8_e4m3fn)
    refused(CheckpointError, saved(changed, tmp_path), "conv_in.weight (torch.float8_e4m3fn)")


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("add_embedding.linear_1.weight", (4, 2560), "an SDXL refiner"),
        (LDM_PREFIX + "label_emb.0.0.weight", (4, 2560), "an SDXL refiner"),
        ("controlnet_cond_embedding.conv_in.weight", (4, 3, 3, 3), "a ControlNet"),
        ("control_model.input_hint_block.0.weight", (4, 3, 3, 3), "a ControlNet"),
        ("conv_in.weight", (24, 9, 3, 3), "9 input channels, as inpainting has"),
        ("conv_in.weight", (24, 8, 3, 3), "8 input channels, as InstructPix2Pix has"),
        ("conv_in.weight", (24, 5, 3, 3), "5 input channels, as depth-to-image has"),
        ("down_blocks.0.attentions.0.lora_A.weight", (4, 4), "a LoRA adapter"),
        (LDM_PREFIX + "joint_blocks.0.x.weight", (4, 4), "Stable Diffusion 3 transformer"),
        ("double_blocks.0.img_attn.weight", (4, 4), "a Flux transformer"),
    ],
)
def test_other_kinds_of_model_are_refused_by_name(name, shape, what, unet_tensors, tmp_path):
    changed = {**unet_tensors, name: torch.zeros(shape)}
    refused(
        UnsupportedModelError, saved(changed, tmp_path), what, "of Stable Diffusion 1.x, 2.x or XL"
    )


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"addition_embed_type": "text_image"}, "other added conditions than SDXL's"),
        ({"addition_embed_type": "text_time"}, "added conditions of no width"),
        (SDXL | {"projection_class_embeddings_input_dim": 32 + 5 * 8}, "it is an SDXL refiner"),
        (SDXL | {"projection_class_embeddings_input_dim": 99}, "that do not fit its text"),
        ({"transformer_layers_per_block": [1, "a", 1]}, "transformer_layers_per_block [1, 'a', 1]"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "another middle block"),
        ({"in_channels": 9}, "9 input channels, as inpainting has"),
        ({"class_embed_type": "timestep"}, "class conditions"),
        ({"down_block_types": ["DownBlock3D"]}, "blocks of type DownBlock3D"),
        ({"resnet_time_scale_shift": "scale_shift"}, "scale-and-shift time conditioning"),
    ],
)
def test_other_unet_configurations_are_refused_by_name(change, what, pipeline):
    edit_json(pipeline / "unet" / "config.json", **change)
    refused(UnsupportedModelError, pipeline, what)


def test_every_family_that_ships_is_itself_accepted():
    from tiue_export.checkpoint.family import check_unet_config

    for name in family_names():
        check_unet_config(load_family(name).unet)


def test_an_unknown_width_says_what_was_seen_and_what_is_known(unet_tensors, tmp_path):
    changed = {
        n: t[:, :16] if n.endswith("attn2.to_k.weight") else t for n, t in unet_tensors.items()
    }
    changed = {n: t.contiguous() for n, t in changed.items()}
    refused(UnsupportedModelError, saved(changed, tmp_path), "text width [16]", "sd15, sd21-base")


def test_a_base_of_another_family_is_refused_by_text_width(pipeline, unet_tensors, tmp_path):
    edit_json(pipeline / "text_encoder" / "config.json", hidden_size=16, num_attention_heads=4)
    file = saved(unet_tensors, tmp_path)
    with pytest.raises(TiueError):
        load_student(file, base=pipeline)


def test_what_does_not_exist_and_what_is_no_model_are_told_apart(tmp_path):
    refused(UsageError, tmp_path / "nothing.safetensors", "does not exist")
    (tmp_path / "folder").mkdir()
    refused(CheckpointError, tmp_path / "folder", "neither a diffusers pipeline")
    page = tmp_path / "page.safetensors"
    page.write_text("<html>404</html>" * 10)
    refused(CheckpointError, page, "is a web page or XML, such as a failed download")
    page.write_bytes(struct.pack("<Q", 5) + b"{nope")
    refused(CheckpointError, page, "its header is not the JSON")


@pytest.mark.parametrize(
    ("name", "content", "kind", "next_step"),
    [
        ("m.gguf", b"GGUF\x03\0\0\0tensors", "a GGUF file, quantized for", "it was made of"),
        ("m.safetensors", b"<!DOCTYPE html><html>", "a web page or XML", "Download the weights"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "pointer", "lfs pull"),
        ("m.safetensors.gz", b"\x1f\x8b\x08\0\0\0\0\0", "a gzip archive", "Unpack it first."),
        ("m.onnx", b"\x08\x08\x12\x07pytorch", "an ONNX graph", "that it was exported from"),
    ],
)
def test_what_is_often_given_for_weights_is_called_what_it_is(
    tmp_path, name, content, kind, next_step
):
    file = tmp_path / name
    file.write_bytes(content)
    refused(CheckpointError, file, f"{file} is ", kind, next_step)


def test_a_zip_of_something_else_than_a_pickle_is_told_to_be_unpacked(tmp_path):
    file = tmp_path / "model.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("unet/config.json", "{}")
    refused(CheckpointError, file, "is a zip archive", "Unpack it, then name the folder.")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    refused(CheckpointError, file, "is a pickle, which can run any code")


def test_a_bundle_and_an_adapter_are_told_which_option_is_theirs(tiny_bundle, tmp_path):
    refused(
        UsageError, tiny_bundle.root, "is a bundle, which was exported already", "Draw with it: "
    )
    file = tmp_path / "lora.safetensors"
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.zeros(1, 1)}, file)
    refused(UnsupportedModelError, file, "a LoRA adapter, not a whole UNet", "with --lora")


def test_a_hub_id_that_cannot_be_reached_says_so_without_a_traceback():
    with pytest.raises(UsageError, match="is no local path, and the hub did not deliver it"):
        load_student("somebody/some-student")


def test_damaged_configuration_files_are_named(pipeline):
    (pipeline / "unet" / "config.json").write_text("{")
    refused(CheckpointError, pipeline, "config.json is not JSON")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"clip_sample": True}, "clip_sample=True"), ({"thresholding": True}, "thresholding")],
)
def test_a_scheduler_that_breaks_the_formula_is_refused_on_loading(change, message, pipeline):
    edit_json(pipeline / "scheduler" / "scheduler_config.json", **change)
    refused(ScheduleError, pipeline, message)


# --- families and names


@pytest.mark.parametrize("family", ["sd15", "sd21-base", "bk-sdm-base", "tiny"])
def test_ldm_names_agree_with_diffusers_own_converter(family):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = load_family(family).unet
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    names = list(unet.state_dict())
    table = ldm_names(names, config)
    assert len(table) == len(names)
    checkpoint = {LDM_PREFIX + ldm: name for ldm, name in table.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert converted == {name: name for name in names}


# Resnets and attentions of a UNet of three levels as diffusers' script names them, which counts two
# resnets a level: "output_blocks.7.1" and the like are also what stable-diffusion.cpp looks for.
_WITH_GAPS = {
    "down_blocks.2.resnets.0.conv1": "input_blocks.7.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.attentions.1": "output_blocks.7.1",
}


def test_ldm_names_of_one_resnet_a_level_may_have_gaps():
    plain, gaps = ldm_spellings(load_family("bk-sdm-tiny").unet)
    assert _WITH_GAPS.items() <= gaps.items()
    assert gaps.keys() == plain.keys()
    assert not any(name.startswith("mid_block") for name in gaps)
    assert len(set(gaps.values())) == len(gaps)
    assert ldm_spellings(load_family("sd15").unet) == [ldm_module_names(load_family("sd15").unet)]


@pytest.mark.parametrize("gaps", [False, True])
def test_an_ldm_file_without_a_middle_block_loads_in_either_spelling(gaps, tiny_pipeline, tmp_path):
    unet = micro_unet(mid_block_type=None)
    tensors, config = unet.state_dict(), json.loads(unet.to_json_string())
    table = ldm_names(list(tensors), config, gaps=gaps)
    file = tmp_path / "student.safetensors"
    named = {LDM_PREFIX + ldm: tensors[own] for ldm, own in table.items()}
    save_file(named, file, metadata={"unet_config": json.dumps(config)})
    student = load_student(file, base=tiny_pipeline)
    assert student.unet.mid_block is None
    assert all(torch.equal(state(student)[name], tensors[name]) for name in tensors)


def test_a_base_of_other_blocks_is_no_source_of_the_unets_configuration(tmp_path):
    from tiue_export.checkpoint.family import config_fits

    shapes = meta_shapes("bk-sdm-tiny")
    assert config_fits(load_family("bk-sdm-tiny").unet, shapes)
    assert not config_fits(load_family("sd15").unet, shapes)


def test_a_family_that_is_like_another_holds_what_differs_alone():
    base, small = load_family("sd15"), load_family("bk-sdm-small")
    assert small.unet == base.unet | {"layers_per_block": 1, "mid_block_type": None}
    assert (small.scheduler, small.text_encoder, small.vae) == (
        base.scheduler,
        base.text_encoder,
        base.vae,
    )


def test_sdxs_dreamshapers_single_step_has_the_published_constants():
    """As another project pinned them against the original: react-native-executorch, 2026."""
    plan = one_pass_plan(load_family("sdxs-512-dreamshaper").scheduler, 1)
    assert plan.timesteps == (999,)
    # diffusers derives them in float32.
    assert plan.latents.noise == pytest.approx(14.642591, rel=1e-6)
    assert plan.latents.outputs == pytest.approx((-14.579279,), rel=1e-6)


def meta_shapes(family: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(load_family(family).unet)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("family", family_names())
def test_families_are_recognised_from_the_shapes_of_their_own_unet(family):
    from tiue_export.checkpoint.family import families_of

    shapes = meta_shapes(family)
    expected = ("sd21-base", "sd21-v") if family.startswith("sd21") else (family,)
    assert families_of(shapes) == expected
    del shapes["conv_out.weight"], shapes[next(n for n in shapes if n.endswith(".conv1.weight"))]
    assert families_of(shapes) == expected, "a damaged file is still told what it lacks"


def test_the_base_schedulers_prediction_type_tells_sd21_from_sd21_base(tmp_path):
    from tiue_export.student.load import _by_prediction

    folder = tmp_path / "scheduler"
    folder.mkdir()
    for prediction, expected in (("epsilon", "sd21-base"), ("v_prediction", "sd21-v")):
        (folder / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
        assert _by_prediction(("sd21-base", "sd21-v"), tmp_path, None) == expected


def test_ambiguous_weights_without_a_scheduler_are_not_guessed():
    from tiue_export.student.load import _by_prediction

    with pytest.raises(UsageError, match="--prediction v_prediction, or pass --base"):
        _by_prediction(("sd21-base", "sd21-v"), None, None)


def test_an_ldm_file_behind_a_wrapper_prefix_loads(tiny_pipeline, tiny_student, tmp_path):
    file = write_ldm_file(tiny_pipeline, tmp_path / "ldm.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in load_file(file).items()}, file)
    assert_same_weights(load_student(file, base=tiny_pipeline), tiny_student)


def test_a_text_encoder_without_a_tokenizer_is_left_out_with_a_note(pipeline):
    shutil.rmtree(pipeline / "tokenizer")
    student = load_student(pipeline)
    assert student.text_encoder is None
    assert student.source.parts["text_encoder"] == "none"
    assert student.source.notes == (
        "the text encoder was left out, because no tokenizer came with it; --base gives one",
    )


def test_the_bases_recorded_k_is_not_the_students(pipeline, unet_tensors, tmp_path):
    edit_json(pipeline / "scheduler" / "scheduler_config.json", tiue_steps=8)
    file = saved(unet_tensors, tmp_path)
    assert load_student(file, base=pipeline).plan.steps == 4


@pytest.mark.parametrize("factor", [0, None, -1, "0.18"])
def test_a_vae_scaling_factor_that_is_no_positive_number_is_refused(factor, pipeline):
    edit_json(pipeline / "vae" / "config.json", scaling_factor=factor)
    refused(CheckpointError, pipeline, "scaling_factor", "expected a positive number")


@pytest.mark.parametrize("value", [None, "abc", True])
def test_scheduler_numbers_that_are_none_are_named(value, pipeline):
    edit_json(pipeline / "scheduler" / "scheduler_config.json", beta_start=value)
    refused(ScheduleError, pipeline, "beta_start", "expected a number")


@pytest.mark.parametrize("value", [None, [], "320", [24]])
def test_a_unet_configuration_that_describes_no_network_is_refused(value, pipeline):
    edit_json(pipeline / "unet" / "config.json", block_out_channels=value)
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        load_student(pipeline)


def test_a_local_looking_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    refused(UsageError, Path("out/typo"), "out/typo does not exist")
    refused(UsageError, Path("org/student.safetensors"), "does not exist")


def test_sd_parameter_counts_are_the_published_ones():
    # BK-SDM's model card; SDXS's UNet by the size of a half-precision copy, 631.8 MB.
    for family, millions in (
        ("sd15", 859.5),
        ("sd21-base", 865.9),
        ("bk-sdm-base", 579.4),
        ("bk-sdm-small", 482.3),
        ("bk-sdm-tiny", 323.4),
        ("sdxs-512-dreamshaper", 315.7),
    ):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(load_family(family).unet)
        count = sum(p.numel() for p in unet.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.05)
