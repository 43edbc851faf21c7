"""Measures of parity, and the gates that decide. A comparison that cannot be made is an error."""

from __future__ import annotations

import math

import numpy as np

from tiue_export.errors import ParityError
from tiue_export.sampling.plan import Plan
from tiue_export.specs import Array

# PSNR in dB that a hop must reach, by what the hop does to the numbers. Peak = max|reference|.
GATES_PSNR_DB = {
    "split": 120.0,
    "fp32": 100.0,
    "fp16": 60.0,
    # An HTP computes norms and sums in half too, where others keep float32: 59.8 dB on the latents
    # of the student that ships, by Qualcomm's emulator (SDK 2.51).
    "htp-fp16": 50.0,
    # On the same latents 43.1 dB, and 39.5 with the shortcuts and ends in half.
    "htp-w8a16": 35.0,
    "htp-w8a8": 30.0,
    "bf16": 40.0,
    # A whole loop in fp32: guidance and the sum over all steps amplify each graph's rounding.
    "fp32-loop": 80.0,
    "int8-weights": 45.0,
    "lut6": 40.0,
    "w8a8": 30.0,
    "4-bit": 30.0,
    "fan-out": 30.0,
}

IDENTICAL_DB = 300.0
# Root of the sum of E_t^2 of a TiUE student at K=4, for which the gates of half precision were set.
_USUAL_GAIN = 2.738


def accept_loss(gentler: str = "") -> str:
    """What to type when a gate fails: options that lose less, where some are left."""
    how = "ccept the loss with --allow-parity-loss (the manifest then says so)."
    return f"Try {gentler}, or a{how}" if gentler else f"A{how}"


def weakest(*kinds: str) -> str:
    """Of several keys of `GATES_PSNR_DB`, the one with the lowest gate."""
    return min(kinds, key=GATES_PSNR_DB.__getitem__)


def gain_db(plan: Plan) -> float:
    """By how many dB more than a TiUE student's the sum of a plan's only pass amplifies rounding.

    One step from t = 999 weighs the network's output by 14.6: its error grows with it, whatever the
    arithmetic. 0 for plans in several passes, whose graphs give the outputs themselves.
    """
    if not plan.one_pass:
        return 0.0
    gain = math.hypot(*plan.latents.outputs)
    return max(0.0, 20 * math.log10(gain / _USUAL_GAIN)) if gain > 0 else 0.0


def psnr_db(reference: Array, value: Array) -> float:
    """20 log10(max|reference| / rms error), in dB; `IDENTICAL_DB` caps an error of zero.

    Raises `ParityError` when the shapes differ or either side holds a non-finite value: such a
    comparison must never count as passed.
    """
    _check_comparable(reference, value)
    wide = reference.astype(np.float64)
    peak = float(np.abs(wide).max())
    difference = np.abs(wide - value.astype(np.float64))
    largest = float(difference.max())
    if largest == 0:
        return IDENTICAL_DB
    if peak == 0:
        return 0.0
    # Scaled before squaring: the square of a large error would overflow.
    error = largest * math.sqrt(float(np.mean((difference / largest) ** 2)))
    return min(IDENTICAL_DB, 20 * math.log10(peak / error))


def max_abs_error(reference: Array, value: Array) -> float:
    """Largest absolute difference; raises like `psnr_db`."""
    _check_comparable(reference, value)
    return float(np.abs(reference.astype(np.float64) - value.astype(np.float64)).max())


def _check_comparable(reference: Array, value: Array) -> None:
    if reference.shape != value.shape:
        raise ParityError(f"shapes differ: reference {reference.shape}, value {value.shape}")
    if reference.size == 0:
        raise ParityError("there is nothing to compare: both arrays are empty")
    for side, array in (("reference", reference), ("value", value)):
        if not np.isfinite(array).all():
            raise ParityError(f"the {side} holds non-finite values")
