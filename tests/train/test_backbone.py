"""A smaller student from a bigger teacher: BK-SDM's shapes, what is copied, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from micro_models import micro_unet

from tiue_export import load_student
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.train.backbone import reduced_config, reduced_unet
from tiue_export.train.config import BACKBONES, DistillConfig
from tiue_export.train.distill import distill
from tiue_export.train.networks import load_networks

# Where BK-SDM's trainer takes the blocks of its students from (copy_weight_from_teacher).
_SMALL = {
    "down_blocks.1.resnets.0": "down_blocks.1.resnets.0",
    "up_blocks.0.resnets.0": "up_blocks.0.resnets.0",
    "up_blocks.0.resnets.1": "up_blocks.0.resnets.2",
    "up_blocks.2.attentions.1": "up_blocks.2.attentions.2",
    "up_blocks.1.upsamplers.0": "up_blocks.1.upsamplers.0",
}
_TINY = {
    "down_blocks.1.attentions.0": "down_blocks.1.attentions.0",
    "up_blocks.0.resnets.0": "up_blocks.1.resnets.0",
    "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
    "up_blocks.0.upsamplers.0": "up_blocks.1.upsamplers.0",
    "up_blocks.1.resnets.1": "up_blocks.2.resnets.2",
}


def teacher(widths: tuple[int, ...] = (8, 16, 16)):
    """Three levels of two resnets, as Stable Diffusion's: the innermost without attention."""
    return micro_unet(
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("whole", "stem"), [("sd15", "bk-sdm-"), ("sd21-base", "bk-sdm-v2-")])
def test_shapes_are_those_that_bk_sdm_published(backbone, whole, stem):
    expected = load_family(stem + backbone.removeprefix("bk-sdm-")).unet
    assert reduced_config(load_family(whole).unet, backbone) == expected


@pytest.mark.parametrize(
    ("backbone", "origins"), [("bk-sdm-small", _SMALL), ("bk-sdm-tiny", _TINY)]
)
def test_blocks_start_as_those_of_the_teacher_that_bk_sdm_takes(backbone, origins):
    big = teacher()
    small, fresh = reduced_unet(big, backbone, seed=0)
    assert fresh == 0
    for own, origin in origins.items():
        got = small.get_submodule(own).state_dict()
        wanted = big.get_submodule(origin).state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_has_another_shape_starts_from_the_seed_alone():
    big = teacher((8, 16, 24))
    (one, fresh), (same, _), (other, _) = (reduced_unet(big, "bk-sdm-tiny", s) for s in (1, 1, 2))
    assert fresh == 4  # norm1, conv1 and the shortcut of the resnet that the lost level fed
    differing = [
        name
        for name, tensor in one.state_dict().items()
        if not torch.equal(tensor, other.state_dict()[name])
    ]
    assert {name.rsplit(".", 2)[0] for name in differing} == {"up_blocks.0.resnets.0"}
    assert all(torch.equal(t, same.state_dict()[name]) for name, t in one.state_dict().items())


def test_a_backbone_that_leaves_nothing_or_everything_is_refused():
    one_level = dict(micro_unet().config)
    with pytest.raises(UsageError, match="leaves no level of a UNet with 1"):
        reduced_config(one_level, "bk-sdm-tiny")
    with pytest.raises(UsageError, match="leaves the teacher's UNet as it is"):
        reduced_config(one_level, "bk-sdm-base")


def test_an_unknown_backbone_lists_the_known_ones(tiny_distillation):
    with pytest.raises(UsageError, match="unknown backbone 'bk-sdm-tiy'") as caught:
        replace(tiny_distillation, backbone="bk-sdm-tiy")
    assert "bk-sdm-tiny" in str(caught.value)


def test_a_student_of_another_shape_than_the_backbones_is_refused(tiny_distillation):
    config = replace(tiny_distillation, student=tiny_distillation.teacher, backbone="bk-sdm-small")
    with pytest.raises(
        UnsupportedModelError, match=r"has mid_block_type UNetMid.* None as bk-sdm-"
    ):
        load_networks(config, torch.device("cpu"))


def test_a_smaller_student_is_trained_resumed_and_taken_as_a_start(
    tiny_distillation: DistillConfig, tmp_path
):
    begun = replace(
        tiny_distillation,
        out=str(tmp_path / "run"),
        backbone="bk-sdm-tiny",
        iterations=1,
        save_every=1,
        sample_every=2,
        samples_per_prompt=1,
    )
    distill(begun)
    folder = distill(replace(begun, iterations=2))
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["step"], len(state["average"]["shadow_params"])) == (2, len(state["student"]))
    student = load_student(folder)
    assert student.unet.mid_block is None
    assert len(student.unet.down_blocks) == 2
    assert student.plan.steps == 4
    onward = replace(begun, student=str(folder), steps=2)
    networks = load_networks(onward, torch.device("cpu"))
    assert (networks.fresh_tensors, networks.student.plan.steps) == (0, 2)
