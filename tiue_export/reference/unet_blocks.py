"""A UNet's blocks by name, and their outputs while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor


def named_blocks(unet: Any) -> dict[str, Any]:
    """A UNet's blocks in the order they run: "down_blocks.0", ..., "mid_block", "up_blocks.0"..."""
    blocks = {
        **{f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)},
        "mid_block": unet.mid_block,
        **{f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)},
    }
    return {name: block for name, block in blocks.items() if block is not None}


@contextmanager
def watched_blocks(unet: Any, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside it `seen` gets the name and the output (C, h, w), float32, of every block that runs.

    Of several rows it is the last, the conditional one of a guided call.
    """

    def hook(name: str, block: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # a down block adds skips
        seen(name, hidden[-1].detach().float())

    with ExitStack() as hooks:
        for name, block in named_blocks(unet).items():
            hooks.callback(block.register_forward_hook(partial(hook, name)).remove)
        yield
