"""Decode latents tile by tile, where the VAE's graph is smaller than the picture.

Most of a picture's memory is the VAE decoder's activations, which grow with its area. A VAE graph
exported for a tile (`--vae-tile`) bounds them on every runtime, as it stays a graph of fixed sizes:
nothing but the graph's own shape says that a bundle is tiled. Tiles overlap by a quarter or more
and are blended linearly. The result is near the whole decode, not equal: each tile has its own
group norm statistics, and attention sees that tile alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tiue_export.specs import Array, GraphSpec

_OVERLAP_SHARE = 4  # a tile shares at least a fourth of its side with the next one
Size = tuple[int, int]


def tile_size(spec: GraphSpec) -> Size:
    """Height and width, in latents, of what the VAE decoder's graph takes."""
    height, width = spec.inputs[0].shape[2:]
    return int(height), int(width)


def is_tiled(spec: GraphSpec, latents: Array) -> bool:
    """Whether latents (B, 4, H, W) are larger than the graph takes."""
    return tile_size(spec) != latents.shape[2:]


def tiles_of(latents: Array, size: Size) -> Iterator[tuple[slice, slice]]:
    """Where the tiles lie in latents (B, 4, H, W), row by row; evenly spread, borders included."""
    for top in tile_starts(latents.shape[2], size[0]):
        for left in tile_starts(latents.shape[3], size[1]):
            yield slice(top, top + size[0]), slice(left, left + size[1])


def first_tile(latents: Array, size: Size) -> Array:
    """The tile in the upper left corner; all of it where the graph takes the whole picture."""
    return np.ascontiguousarray(latents[:, :, : size[0], : size[1]])


def tile_starts(length: int, tile: int) -> list[int]:
    """Starts of the fewest tiles that cover `length` and overlap by a quarter of a tile or more.

    >>> tile_starts(64, 32)
    [0, 16, 32]
    """
    if length <= tile:
        return [0]
    step = max(1, tile - -(-tile // _OVERLAP_SHARE))
    count = 1 + -(-(length - tile) // step)
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def decode_in_tiles(decode: Callable[[Array], Array], latents: Array, size: Size) -> Array:
    """Latents (B, 4, H, W) -> picture (B, 3, sH, sW) float32, by calls of `decode` on tiles.

    `decode` takes (B, 4, *size) and returns a picture s times as large along each side. Every
    pixel is the mean of the tiles that show it, each weighted by its distance to that tile's edge.
    """
    if latents.shape[2:] == size:
        return decode(latents)
    total: Array | None = None
    for rows, columns in tiles_of(latents, size):
        picture = decode(np.ascontiguousarray(latents[:, :, rows, columns]))
        scale = picture.shape[2] // size[0]
        if total is None:
            shape = (*picture.shape[:2], latents.shape[2] * scale, latents.shape[3] * scale)
            total, weights = np.zeros(shape, np.float32), np.zeros(shape[2:], np.float32)
        weight = np.outer(_ramp(size[0] * scale), _ramp(size[1] * scale))
        where = (..., _scaled(rows, scale), _scaled(columns, scale))
        total[where] += weight * picture
        weights[where] += weight
    assert total is not None  # there is always a first tile
    total /= weights
    return total


def _ramp(length: int) -> Array:
    """Rises from each edge to the overlap's depth, then flat: (length,) float32, nowhere zero."""
    depth = max(1, length // _OVERLAP_SHARE)
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    ramp: Array = np.minimum(1.0, distance / depth).astype(np.float32)
    return ramp


def _scaled(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)
