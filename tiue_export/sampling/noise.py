"""Seed to noise: one NumPy definition, so that a seed means the same on every runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.specs import Array

MAX_SEED = 2**32 - 1
# A plan of so many takes seconds and half a gigabyte; ten times as many look like a hang.
MAX_PICTURES = 1_000_000


def noise_from_seed(seed: int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise, float32, of `shape` (B, 4, H, W); row b uses seed + b.

    NumPy froze RandomState's stream for good (NEP 19), which Generator's is not; Apple's Swift
    runtime implements the same generator, so a seed carries over to a phone.
    """
    noise: Array = noises_from_seed(seed, 1, shape)[0]
    return noise


def noises_from_seed(seed: int, noises: int, shape: tuple[int, ...]) -> Array:
    """The initial noise and the fresh ones of a plan, (noises, B, 4, H, W) float32.

    A picture draws all of them from the one stream of its seed: first the initial noise, then one
    draw of the same shape for each fresh noise, in the order of the passes.
    """
    check_seeds(seed, shape[0])
    size = (noises, *shape[1:])
    rows = [np.random.RandomState(seed + row).standard_normal(size) for row in range(shape[0])]
    return np.stack(rows, axis=1).astype(np.float32)


def check_seeds(seed: int, count: int) -> None:
    """Refuse seeds seed .. seed + count - 1 unless all are 32-bit."""
    if not 0 <= seed <= MAX_SEED - (count - 1):
        raise UsageError(f"seed {seed} is out of range; expected 0 to {MAX_SEED - count + 1}")


def check_picture_count(count: int) -> None:
    """Refuse a request for more pictures than one run plans."""
    if count > MAX_PICTURES:
        raise UsageError(
            f"{count:,} pictures in one run; expected at most {MAX_PICTURES:,}",
            "Draw them in several runs, each with its own --seed and --out.",
        )


def noise_from_file(path: Path, shape: tuple[int, ...]) -> Array:
    """Noise from an .npy file: (4, H, W) for one noise or `shape` (N, 4, H, W), a plan's noises."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for without end
        raise UsageError(f"{path} cannot be read as an .npy array: it is no file")
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy raises TokenError, BadZipFile and more on foreign files
        raise UsageError(
            f"{path} cannot be read as an .npy array: {error}",
            "Write it with numpy.save('latents.npy', noise.astype('float32')).",
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise UsageError(f"{path} does not hold one array of floating-point numbers")
    with np.errstate(over="ignore"):  # what overflows is refused below
        noise = array.astype(np.float32)
    if noise.shape == shape[1:]:
        noise = noise[None]
    if noise.shape != shape:
        raise UsageError(f"{path} has shape {array.shape}; this request needs {shape}")
    if not np.isfinite(noise).all():
        raise UsageError(f"{path} holds non-finite values")
    return noise
