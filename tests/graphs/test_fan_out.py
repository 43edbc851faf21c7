"""Rows that part late: what a fan-out means, and that every graph computes just that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.graphs.test_split import FEW, assert_same, request, students
from tiue_export.errors import UsageError
from tiue_export.graphs.build import exported_plan
from tiue_export.graphs.folded import NaiveDecoder, UNetEncoder
from tiue_export.graphs.hoisting import hoist
from tiue_export.graphs.options import ExportOptions
from tiue_export.sampling.fan_out import FanOut
from tiue_export.student.model import Student, output_head
from tiue_export.student.up_path import places, text_for

SIZE_PX = (64, 64)  # which only SDXL is told


def parted(student: Student, fan_out: FanOut) -> Student:
    """The same model with rows that part at `fan_out`."""
    plan = replace(student.plan, fan_out=fan_out)
    return Student(student.unet, plan, source=None, scheduler_config={}).eval()


@st.composite
def parted_students(draw) -> Student:
    """A random student whose rows part anywhere, at the very start and the very end included."""
    student = draw(students())
    return parted(student, draw(st.sampled_from(places(student.unet.up_blocks))))


def by_hand(student: Student, noise: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    """Each row by diffusers' whole blocks, where shared resnets are told the first timestep."""
    unet, fan_out = student.unet, student.plan.fan_out
    features = student.encode(noise, text)
    first = student.time_embedding(student.plan.timesteps[:1]).expand(len(noise), -1)
    hooks = [
        resnet.register_forward_pre_hook(lambda module, inputs: (inputs[0], first))
        for i, block in enumerate(unet.up_blocks)
        for j, resnet in enumerate(block.resnets)
        if FanOut(i, j) < fan_out
    ]
    rows = []
    for timestep in student.plan.timesteps:
        time = student.time_embedding((timestep,)).expand(len(noise), -1)
        hidden, skips = features.mid, features.skips
        for block in unet.up_blocks:
            count = len(block.resnets)
            hidden = block(hidden, skips[-count:], time, **text_for(block, text))
            skips = skips[:-count]
        rows.append(output_head(unet, hidden))
    for hook in hooks:
        hook.remove()
    return rows


@FEW
@given(parted_students(), st.integers(1, 2))
@torch.no_grad()
def test_what_lies_before_the_fan_out_knows_the_first_timestep_alone(student, batch):
    noise, text = request(student, batch)
    rows = student.decode(student.encode(noise, text), text)
    assert_same(torch.cat(by_hand(student, noise, text)), rows)


@FEW
@given(students())
@torch.no_grad()
def test_rows_that_part_at_once_are_tiue_bit_for_bit(student):
    noise, text = request(student, 1)
    features = student.encode(noise, text)
    tiled = [skip.repeat(student.plan.rows, 1, 1, 1) for skip in features.skips]
    time = student.time_embedding(student.plan.timesteps)
    hidden, texts = features.mid.repeat(len(time), 1, 1, 1), text.repeat(len(time), 1, 1)
    for block in student.unet.up_blocks:
        count = len(block.resnets)
        hidden = block(hidden, tuple(tiled[-count:]), time, **text_for(block, texts))
        del tiled[-count:]
    outputs = parted(student, FanOut()).decode(features, text)
    assert torch.equal(output_head(student.unet, hidden), outputs)


@FEW
@given(students(), st.integers(1, 2))
@torch.no_grad()
def test_sharing_all_is_one_row_with_the_sum_of_the_weights(student, batch):
    noise, text = request(student, batch)
    whole = parted(student, FanOut(len(student.unet.up_blocks)))
    plan = exported_plan(whole, ExportOptions())
    assert plan.rows == 1
    assert plan.latents.outputs == pytest.approx([sum(student.plan.latents.outputs)])
    single = Student(student.unet, plan, source=None, scheduler_config={}).eval()
    assert_same(whole.sample(noise, text), single.sample(noise, text))


@FEW
@given(parted_students(), st.integers(1, 3), st.sampled_from([(8, 8), (16, 8)]))
@torch.no_grad()
def test_hoisted_equals_naive_equals_the_parted_student(student, batch, size):
    noise, text = request(student, batch, *size)
    expected = student.sample(noise, text)
    plan = exported_plan(student, ExportOptions())
    features = UNetEncoder(student.unet, plan, SIZE_PX, torch.float64)(noise, text)
    naive = NaiveDecoder(student.unet, plan, SIZE_PX, torch.float64)
    assert_same(expected, naive(noise, text, *features)[0])
    shared, rows = hoist(student.unet, plan, SIZE_PX, torch.float64)
    assert_same(expected, rows(noise, shared(text, *features)))


def test_a_parted_student_learns_in_its_trunk_and_in_its_rows(tiny_pipeline):
    from tiue_export import load_student

    student = load_student(tiny_pipeline)
    student.plan = replace(student.plan, fan_out=FanOut(1, 1))
    student.unet.enable_gradient_checkpointing()
    student.train()
    noise, text = request(student, 1)
    student.sample(noise, text).square().mean().backward()
    for name, parameter in student.unet.named_parameters():
        assert parameter.grad is not None, name


def test_a_fan_out_is_spelled_in_blocks_and_resnets_of_the_next():
    assert [str(FanOut.parse(text)) for text in ("0", "2", "1.2", " 3 ")] == ["0", "2", "1.2", "3"]
    assert sorted([FanOut(1), FanOut(0, 2), FanOut(1, 1)]) == [
        FanOut(0, 2),
        FanOut(1),
        FanOut(1, 1),
    ]
    for text in ("", "-1", "1.", "two", "1.2.3", "1e3"):
        with pytest.raises(UsageError, match="expected a number of up blocks, such as 2"):
            FanOut.parse(text)


def test_a_fan_out_beyond_the_up_path_is_refused_with_what_there_is(tiny_student):
    for place in (FanOut(9), FanOut(0, 7), FanOut(len(tiny_student.unet.up_blocks), 1)):
        with pytest.raises(UsageError, match=rf"--fan-out is {place}; this UNet has \d up blocks"):
            exported_plan(tiny_student, ExportOptions(fan_out=place))
