"""LoRA files merged into weights: as diffusers fuses them, in every spelling, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tiue_export import load_student
from tiue_export.checkpoint.lora_file import lora_from, read_adapters
from tiue_export.errors import CheckpointError, TiueError, UnsupportedModelError, UsageError
from tiue_export.student.lora import merge_lora

peft = pytest.importorskip("peft", reason="peft is not installed")
RANK, ALPHA = 4, 6
UNET_LAYERS = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1", "time_emb_proj", "proj_in"]
TEXT_LAYERS = ["q_proj", "fc1"]


@pytest.fixture
def student(tiny_pipeline: Path):
    """One of one's own, as merging changes it."""
    return load_student(tiny_pipeline)


@pytest.fixture(scope="module")
def lora_folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of UNet and text encoder as diffusers saves it, and the weights it fuses into."""
    folder = tmp_path_factory.mktemp("lora")
    student = load_student(tiny_pipeline)
    pipeline = StableDiffusionPipeline(
        vae=student.vae,
        text_encoder=student.text_encoder,
        tokenizer=None,
        unet=student.unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.manual_seed(0)
    layers, metadata = {}, {}
    for part, targets in (("unet", UNET_LAYERS), ("text_encoder", TEXT_LAYERS)):
        model = getattr(pipeline, part)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.1)
        layers[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(model)
        metadata[f"{part}_lora_adapter_metadata"] = config.to_dict()
    for key in ("target_modules",):
        for config_ in metadata.values():
            config_[key] = sorted(config_[key])
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    pipeline.unet.delete_adapters("default")
    pipeline.text_encoder.delete_adapter("default")
    pipeline.load_lora_weights(folder / "pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    for part in ("unet", "text_encoder"):
        state = getattr(pipeline, part).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{part}.fused")
    return folder


def saved(folder: Path) -> Path:
    return folder / "pytorch_lora_weights.safetensors"


def assert_fused(student, folder: Path, parts=("unet", "text_encoder")) -> None:
    for part in parts:
        expected = load_file(folder / f"{part}.fused")
        found = getattr(student, part).state_dict()
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def kohya(file: Path, out: Path, ldm: dict[str, str] | None = None) -> Path:
    """The same adapters in kohya's names, each with its alpha."""
    tensors = {}
    for name, tensor in load_file(file).items():
        part, module = name.split(".", 1)
        module, side = module.rsplit(".lora_", 1)
        side = {"A.weight": "down", "B.weight": "up"}.get(side) or side
        if module.endswith((".lora", ".lora_linear_layer")):
            module = module.rsplit(".", 1)[0]
        if part == "unet":
            place = "lora_unet_" + module.replace(".", "_")
        else:
            place = "lora_te_text_model_" + module.removeprefix("text_model.").replace(".", "_")
        tensors[f"{place}.lora_{side}.weight"] = tensor
        tensors[f"{place}.alpha"] = torch.tensor(float(ALPHA))
    save_file(tensors, out)
    return out


def test_it_is_what_diffusers_fuses(student, lora_folder):
    before = student.source
    merged = merge_lora(student, saved(lora_folder), 0.7)
    assert merged is student
    assert_fused(student, lora_folder)
    assert student.source.sha256 != before.sha256
    assert student.source.notes[-1] == "LoRA pytorch_lora_weights.safetensors merged at scale 0.7"


def test_kohyas_names_mean_the_same(student, lora_folder, tmp_path):
    merge_lora(student, kohya(saved(lora_folder), tmp_path / "k.safetensors"), 0.7)
    assert_fused(student, lora_folder)


@pytest.mark.parametrize(
    ("down", "up"), [("lora.down", "lora.up"), ("lora_A.default", "lora_B.default")]
)
def test_older_spellings_mean_the_same(student, lora_folder, tmp_path, down, up):
    tensors = {
        name.removeprefix("unet.")
        .replace("lora_A", down)
        .replace("lora_B", up)
        .replace("lora.down", down)
        .replace("lora.up", up): tensor
        for name, tensor in load_file(saved(lora_folder)).items()
        if name.startswith("unet.")
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": ALPHA, "r": RANK}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    merge_lora(student, tmp_path / "adapter_model.safetensors", 0.7)
    assert_fused(student, lora_folder, parts=("unet",))


def test_names_of_original_checkpoints_mean_the_same(student, tmp_path):
    down, up = torch.ones(2, 32), torch.ones(24, 2)
    layer = student.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    before = layer.weight.clone()
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
    file = tmp_path / "ldm.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)
    merge_lora(student, file, 0.5)
    torch.testing.assert_close(layer.weight, before + 1.0)


def test_a_scale_of_zero_changes_nothing_and_of_minus_one_undoes(student, lora_folder):
    before = {k: v.clone() for k, v in student.unet.state_dict().items()}
    merge_lora(student, saved(lora_folder), 0.0)
    for name, tensor in student.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
    merge_lora(student, saved(lora_folder))
    merge_lora(student, saved(lora_folder), -1.0)
    for name, tensor in student.unet.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)


def test_weights_without_an_alpha_have_their_rank_for_it(tmp_path):
    file = tmp_path / "l.safetensors"
    shapes = {"lora_A": (3, 5), "lora_B": (2, 3)}
    save_file({f"unet.a.{side}.weight": torch.ones(s) for side, s in shapes.items()}, file)
    (adapter,) = read_adapters(file)
    assert (adapter.part, adapter.layer, adapter.scale) == ("unet", "a", 1.0)
    assert adapter.delta().shape == (2, 5)


FIRST = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        (
            {"lora_te2_x.lora_down.weight": (2, 4), "lora_te2_x.lora_up.weight": (4, 2)},
            UnsupportedModelError,
            "is a LoRA of SDXL, which has two text encoders; this model has one",
        ),
        ({"lora_unet_x.hada_w1_a": (2, 4)}, UnsupportedModelError, "is a LoHa, not a LoRA"),
        ({"unet.x.lora_magnitude_vector": (2, 4)}, UnsupportedModelError, "is a DoRA"),
        ({"transformer.x.lora_A.weight": (2, 4)}, UnsupportedModelError, "diffusion transformer"),
        ({"conv_in.weight": (2, 4)}, CheckpointError, 'is no LoRA: what is "conv_in.weight"?'),
        ({f"{FIRST}.lora_down.weight": (2, 32)}, CheckpointError, "has down only"),
        (
            {f"{FIRST}.lora_down.weight": (2, 32), f"{FIRST}.lora_up.weight": (24, 3)},
            CheckpointError,
            "whose ranks do not fit",
        ),
        (
            {f"{FIRST}.lora_down.weight": (2, 768), f"{FIRST}.lora_up.weight": (24, 2)},
            UnsupportedModelError,
            "is of another family: its down_blocks_0",
        ),
        (
            {"unet.x.y.lora_A.weight": (2, 4), "unet.x.y.lora_B.weight": (4, 2)},
            UnsupportedModelError,
            "1 of its 1 layers are not in this model, such as x_y",
        ),
    ],
)
def test_what_is_no_lora_of_this_family_is_refused(student, tmp_path, tensors, kind, message):
    file = tmp_path / "wrong.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    before = student.source
    with pytest.raises(kind) as caught:
        merge_lora(student, file)
    assert message in caught.value.message
    assert student.source == before


def test_a_text_width_names_both_families(tmp_path):
    from tiue_export.checkpoint.lora_file import Adapter
    from tiue_export.student.lora import _widths

    adapter = Adapter("unet", "x_attn2_to_k", torch.ones(2, 768), torch.ones(320, 2), 1.0)
    told = _widths(adapter, torch.ones(320, 1024))
    assert told == " (Stable Diffusion 1.x against Stable Diffusion 2.x)"


def test_a_text_encoder_that_is_not_there_is_asked_for(tiny_pipeline, lora_folder):
    bare = load_student(tiny_pipeline, without=("text_encoder",))
    with pytest.raises(UsageError) as caught:
        merge_lora(bare, saved(lora_folder))
    assert "the checkpoint has none" in caught.value.message


def test_a_pickle_is_refused(student, tmp_path):
    file = tmp_path / "lora.pt"
    file.write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError):
        merge_lora(student, file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("folder:x/a.safetensors", ("folder:x/a.safetensors", 1.0)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
    ],
)
def test_a_file_may_have_a_scale_behind_a_colon(text, expected):
    path, scale = lora_from(text)
    assert (str(path), scale) == expected


@pytest.mark.parametrize("text", ["a.safetensors:big", "a.safetensors:nan", "a.safetensors:1e9"])
def test_a_scale_that_is_no_number_is_refused(text):
    with pytest.raises(TiueError, match="--lora"):
        lora_from(text)
