"""What a bulk run asks of the place it writes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .drawing import Sample
from .plan import Chunk


class PictureWriter(Protocol):
    """Files of finished pictures. A kill at any moment leaves whole chunks, or what is redrawn."""

    def written(self) -> set[int]:
        """The chunks that are there whole; called once, before anything is written."""
        ...

    def write(self, chunk: Chunk, samples: Sequence[Sample]) -> None:
        """Write one chunk; they come in order."""
        ...

    def finish(self) -> list[Path]:
        """Check that every picture is there once; returns the files to name to the user."""
        ...

    def close(self) -> None:
        """Close what is open, finished or not."""
        ...
