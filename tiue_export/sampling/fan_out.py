"""Where the decoder rows of one pass part: what lies before that runs once for all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tiue_export.errors import UsageError

_SPELLING = re.compile(r"(\d{1,2})(?:\.(\d{1,2}))?")


@dataclass(frozen=True, order=True)
class FanOut:
    """How much of the decoder all rows share, counted in up blocks and resnets of the next one.

    That trunk runs once, at the first timestep; a resnet's attention goes with it, as nothing but a
    resnet knows the timestep. (0, 0) is TiUE: every row runs the whole decoder.
    """

    blocks: int = 0
    resnets: int = 0

    @classmethod
    def parse(cls, text: str, name: str = "--fan-out") -> FanOut:
        """ "2" is two up blocks, "1.2" one up block and two resnets of the next."""
        match = _SPELLING.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{name} is {text!r}; expected a number of up blocks, such as 2, or with resnets "
                "of the next block, such as 1.2"
            )
        return cls(int(match[1]), int(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.blocks}.{self.resnets}" if self.resnets else str(self.blocks)

    def __bool__(self) -> bool:
        return (self.blocks, self.resnets) != (0, 0)
