"""Pictures in WebDataset shards: tar files with KEY.png, KEY.txt and KEY.json for each.

A shard grows under a hidden name, chunk by chunk, and gets its own name when it is whole. After a
kill the hidden file is cut back to its last whole chunk and grown on. Equal pictures give equal
shards, byte for byte: times and owners in them are zero.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tiue_export.errors import RuntimeFailure

from .drawing import Sample
from .plan import BulkPlan, Chunk, TableJob

_SUFFIXES = (".png", ".txt", ".json")


class TarShards:
    """pictures-000000.tar and on; chunks must be written in order."""

    def __init__(self, folder: Path, plan: BulkPlan) -> None:
        self._folder, self._plan = folder, plan
        self._shards = plan.shards()
        self._open: tuple[int, BinaryIO] | None = None

    def written(self) -> set[int]:
        """The chunks that are there whole; what a kill left behind them is cut away."""
        done: set[int] = set()
        starts: dict[int, list[Chunk]] = {}
        for chunk in self._plan.chunks():
            starts.setdefault(chunk.shard, []).append(chunk)
        for shard, chunks in starts.items():
            if self._path(shard).exists():
                self._check(shard)
                done.update(chunk.index for chunk in chunks)
            elif self._partial(shard).exists():
                done.update(self._cut_back(shard, chunks))
        return done

    def write(self, chunk: Chunk, samples: Sequence[Sample]) -> None:
        """Append one chunk, safe on disk when this returns."""
        if self._open is None or self._open[0] != chunk.shard:
            self.close()
            self._open = chunk.shard, self._partial(chunk.shard).open("ab")
        file = self._open[1]
        for sample in samples:
            contents = (sample.png, sample.text.encode(), sample.record.encode())
            for suffix, content in zip(_SUFFIXES, contents, strict=True):
                file.write(_member(f"{sample.key}{suffix}", content))
        file.flush()
        os.fsync(file.fileno())
        if chunk.jobs[-1].key == self._shards[chunk.shard][-1].key:
            self._complete(chunk.shard)

    def finish(self) -> list[Path]:
        """Check that every shard is whole and holds its pictures once; returns them."""
        for shard in range(len(self._shards)):
            # A kill may fall between a shard's last chunk and its renaming.
            if not self._path(shard).exists() and self._partial(shard).exists():
                self._complete(shard)
            self._check(shard)
        return [self._path(shard) for shard in range(len(self._shards))]

    def close(self) -> None:
        """Close the shard that is being written."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _complete(self, shard: int) -> None:
        self.close()
        partial = self._partial(shard)
        with partial.open("ab") as file:
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path(shard))

    def _cut_back(self, shard: int, chunks: list[Chunk]) -> list[int]:
        """Cut a partial shard to its last whole chunk; returns the chunks that stay."""
        path = self._partial(shard)
        ends = dict(_ends(path, self._shards[shard]))
        whole = [chunk for chunk in chunks if chunk.jobs[-1].key in ends]
        os.truncate(path, ends[whole[-1].jobs[-1].key] if whole else 0)
        return [chunk.index for chunk in whole]

    def _check(self, shard: int) -> None:
        path, jobs = self._path(shard), self._shards[shard]
        found = len(list(_ends(path, jobs))) if path.exists() else 0
        if found != len(jobs):
            raise RuntimeFailure(
                f"{path} holds {found} of its {len(jobs)} pictures",
                f"Delete it and run the same line again: rm {path}",
            )

    def _path(self, shard: int) -> Path:
        return self._folder / f"pictures-{shard:06d}.tar"

    def _partial(self, shard: int) -> Path:
        return self._folder / f".pictures-{shard:06d}.tar.partial"


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + padding


def _ends(path: Path, jobs: Sequence[TableJob]) -> Iterator[tuple[str, int]]:
    """Key and end in bytes of each whole sample, as long as they are the expected ones in order."""
    size_bytes = path.stat().st_size
    expected = ((job.key, suffix) for job in jobs for suffix in _SUFFIXES)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = next(expected, ("", ""))
                end = member.offset_data + member.size
                end += -member.size % tarfile.BLOCKSIZE
                if member.name != f"{key}{suffix}" or end > size_bytes:
                    return
                if suffix == _SUFFIXES[-1]:
                    yield key, end
    except tarfile.ReadError:  # empty, or cut within a header
        return
