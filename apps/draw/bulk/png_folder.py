"""Pictures as PNG files in one folder, with metadata.jsonl as Hugging Face's image folders have it.

A chunk is written when all its files are there: an interrupted one is drawn again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tiue_export.errors import RuntimeFailure

from .drawing import Sample
from .plan import BulkPlan, Chunk

_PARTIAL = ".partial"
_INDEX = "metadata.jsonl"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class PngFolder:
    """KEY.png for every job, each file whole or not there."""

    def __init__(self, folder: Path, plan: BulkPlan) -> None:
        self._folder, self._plan = folder, plan
        for leftover in folder.glob(f".*{_PARTIAL}"):
            leftover.unlink()

    def written(self) -> set[int]:
        """The chunks that are there whole."""
        there = {name for name in self._pictures() if _is_whole(self._folder / name)}
        return {
            chunk.index
            for chunk in self._plan.chunks()
            if all(f"{job.key}.png" in there for job in chunk.jobs)
        }

    def write(self, chunk: Chunk, samples: Sequence[Sample]) -> None:
        """Write one chunk; chunks may come in any order."""
        for sample in samples:
            _write_whole(self._folder / f"{sample.key}.png", sample.png)

    def finish(self) -> list[Path]:
        """Write the index and check that every picture is there, and nothing else."""
        expected = {f"{job.key}.png" for job in self._plan.jobs}
        there = self._pictures()
        if there != expected:
            odd = sorted(there ^ expected)
            raise RuntimeFailure(
                f"{self._folder} should hold {len(expected)} pictures and holds {len(there)}; "
                f"{odd[0]} is {'missing' if odd[0] in expected else 'none of them'}",
                "Was the folder changed meanwhile? Run the same line again.",
            )
        lines = [
            json.dumps(
                {"file_name": f"{each.key}.png", "prompt": each.job.prompt, "seed": each.job.seed},
                ensure_ascii=False,
            )
            for each in self._plan.jobs
        ]
        _write_whole(self._folder / _INDEX, ("\n".join(lines) + "\n").encode())
        return [self._folder / _INDEX]

    def close(self) -> None:
        """Nothing is held open."""

    def _pictures(self) -> set[str]:
        return {name for name in os.listdir(self._folder) if name.endswith(".png")}


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    with partial.open("wb") as file:
        file.write(data)
    partial.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether a picture's end is there: a power cut may leave a file of zeros under its name.

    Forcing each small file to disk when it is written costs several times what drawing does.
    """
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(-min(file.tell(), len(_PNG_END)), os.SEEK_END)
        return file.read() == _PNG_END
