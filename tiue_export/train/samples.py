"""What a training step draws: samples cut for processes and memory, in an order epoch by epoch.

Everything random is drawn for the whole batch from (seed, step), and each process takes its slice:
two processes compute what one does, and a resumed run what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .config import DistillConfig

if TYPE_CHECKING:
    from typing import Self


@dataclass(frozen=True)
class Samples:
    """Prompts (B); a method adds its tensors as further fields, (B, ...) each."""

    prompts: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def slices(self, size: int, device: torch.device) -> Iterator[Self]:
        """Parts of at most `size` samples, on `device`."""
        for first in range(0, len(self), size):
            part = slice(first, first + size)
            tensors = {
                name: getattr(self, name)[part].to(device)
                for name in self.__dataclass_fields__
                if name != "prompts"
            }
            yield type(self)(self.prompts[part], **tensors)

    def share(self, rank: int, world: int) -> Self:
        """What process `rank` of `world` trains on."""
        return list(self.slices(len(self) // world, torch.device("cpu")))[rank]


def step_generator(config: DistillConfig, step: int) -> torch.Generator:
    """The source of all that is random in one step."""
    return torch.Generator().manual_seed(config.seed * 1_000_003 + step)


def epoch_indices(config: DistillConfig, count: int, step: int) -> list[int]:
    """Which of `count` things a step takes. Each epoch is a permutation of its own; a batch may
    span two of them.
    """
    indices = []
    for place in range(step * config.batch, (step + 1) * config.batch):
        epoch, offset = divmod(place, count)
        indices.append(int(_permutation(config.seed, epoch, count)[offset]))
    return indices


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
