"""The UNet's up path: run block by block, and cut in two where decoder rows part.

Blocks are diffusers' own; what a cut leaves of a block is that block with fewer resnets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tiue_export.errors import UsageError
from tiue_export.sampling.fan_out import FanOut


class UpPath(NamedTuple):
    """`trunk` runs once for all rows, `rows` for each; a block that is cut has a part in both."""

    trunk: tuple[Any, ...]
    rows: tuple[Any, ...]


def cut_up_path(up_blocks: Any, fan_out: FanOut) -> UpPath:
    """The up blocks before and after the place where rows part; modules are shared, not copied.

    Raises `UsageError` for a place that the up path does not have.
    """
    check_place(up_blocks, fan_out)
    whole = list(up_blocks)
    trunk, rows = whole[: fan_out.blocks], whole[fan_out.blocks :]
    if fan_out.resnets:
        trunk.append(_part(rows[0], slice(None, fan_out.resnets), ends=False))
        rows[0] = _part(rows[0], slice(fan_out.resnets, None), ends=True)
    return UpPath(tuple(trunk), tuple(rows))


def shares_all(up_blocks: Any, fan_out: FanOut) -> bool:
    """Whether the rows part behind the last block: then they differ in nothing."""
    return not cut_up_path(up_blocks, fan_out).rows


def places(up_blocks: Any) -> tuple[FanOut, ...]:
    """Every place where rows can part, from TiUE's to the end of the up path."""
    inside = [FanOut(i, j) for i, block in enumerate(up_blocks) for j in range(len(block.resnets))]
    return (*inside, FanOut(len(up_blocks)))


def check_place(up_blocks: Any, fan_out: FanOut, name: str = "--fan-out") -> None:
    """Raise `UsageError` for a place that the up path does not have."""
    resnets = [len(block.resnets) for block in up_blocks]
    inside = fan_out.blocks < len(resnets) and fan_out.resnets < resnets[fan_out.blocks]
    if not inside and fan_out != FanOut(len(resnets)):
        raise UsageError(
            f"{name} is {fan_out}; this UNet has {len(resnets)} up blocks of "
            f"{', '.join(map(str, resnets))} resnets",
            f"Give 0 to {len(resnets)}, or a block and fewer resnets than the next one has.",
        )


def _part(block: Any, resnets: slice, *, ends: bool) -> Any:
    """An up block with some of its resnets and their attentions; the upsampler `ends` it."""
    part = copy.copy(block)
    part._modules = dict(block._modules)  # else the copy's modules were the block's own table
    for name in ("resnets", "attentions"):
        if getattr(block, name, None) is not None:
            setattr(part, name, getattr(block, name)[resnets])
    if not ends:
        part.upsamplers = None
    return part


def run_up_blocks(
    blocks: Any, hidden: Tensor, skips: Sequence[Tensor], time: Tensor, text: Tensor
) -> Tensor:
    """Up blocks over N rows: hidden (N, C, h, w), their own skips in the encoder's order,
    time (N, D_t) or what folded resnets take, text (N, L, D)."""
    skips = list(skips)
    for block in blocks:
        count = len(block.resnets)
        block_skips, skips = tuple(skips[-count:]), skips[:-count]
        hidden = block(hidden, block_skips, time, **text_for(block, text))
    return hidden


def skip_count(blocks: Any) -> int:
    """How many skips up blocks take: one a resnet."""
    return sum(len(block.resnets) for block in blocks)


def text_for(block: nn.Module, text: Tensor) -> dict[str, Tensor]:
    """The text as a block of the UNet takes it: not at all where it has no text attention."""
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": text} if attends else {}
