"""Ranges of activations from a stream: a histogram of |x| that grows, and what is read off it.

Thresholds are for symmetric int8. Methods:
  min-max     the largest |x| seen
  percentile  below which the given share of values lies
  entropy     the threshold whose quantized distribution is nearest (Kullback-Leibler divergence) to
              the clipped one; S. Migacz, "8-bit inference with TensorRT", GTC 2017
"""

from __future__ import annotations

import numpy as np

from tiue_export.proof.quantization import RangeMethod
from tiue_export.specs import Array

BINS = 2048
LEVELS = 127
_LEAST_BINS = LEVELS + 1
_CANDIDATES = 96


class Histogram:
    """Counts of |x| in `BINS` equal bins from 0; the bins double in width when values outgrow them.

    `largest` is exact, whatever part of the values was added.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.largest = 0.0

    def add(self, values: Array, largest: float | None = None) -> None:
        """Count |values| (any shape); `largest` is that of the tensor they were sampled from."""
        magnitudes = np.abs(np.asarray(values, np.float64)).ravel()
        top = float(magnitudes.max(initial=0.0)) if largest is None else float(largest)
        top = max(top, float(magnitudes.max(initial=0.0)))
        self.largest = max(self.largest, top)
        if top == 0.0 and self.width == 0.0:
            self.counts[0] += magnitudes.size
            return
        if self.width == 0.0:
            self.width = top / BINS
        while self.largest > self.width * BINS:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([pairs, np.zeros(BINS // 2, np.int64)])
            self.width *= 2
        index = np.minimum((magnitudes / self.width).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def threshold(self, method: RangeMethod) -> float:
        """The |x| that becomes the largest int8 value."""
        if method.name == "min-max" or self.width == 0.0:
            return self.largest
        if method.name == "percentile":
            return min(self.largest, self._percentile(method.percentile))
        return min(self.largest, self._entropy())

    def _percentile(self, percent: float) -> float:
        reached = np.cumsum(self.counts) >= self.counts.sum() * (percent / 100)
        return (int(np.argmax(reached)) + 1) * self.width

    def _entropy(self) -> float:
        last = int(np.flatnonzero(self.counts)[-1]) + 1
        if last <= _LEAST_BINS:
            return last * self.width
        candidates = np.unique(np.linspace(_LEAST_BINS, last, _CANDIDATES).astype(int))
        losses = [_divergence(self.counts, int(bins)) for bins in candidates]
        return int(candidates[int(np.argmin(losses))]) * self.width


def _divergence(counts: Array, bins: int) -> float:
    """KL divergence of the first `bins` bins, with all beyond added to the last of them, from the
    same quantized to `LEVELS` + 1 levels.
    """
    reference = counts[:bins].astype(np.float64)
    level = (np.arange(bins) * (LEVELS + 1)) // bins
    filled = reference > 0
    totals = np.bincount(level, weights=reference, minlength=LEVELS + 1)
    occupied = np.bincount(level, weights=filled, minlength=LEVELS + 1)
    spread = np.where(filled, totals[level] / np.maximum(occupied[level], 1), 0.0)
    reference[-1] += counts[bins:].sum()
    if spread.sum() == 0:
        return float("inf")
    p, q = reference / reference.sum(), spread / spread.sum()
    # A clipped tail that meets an empty last level costs what one count would.
    q = np.maximum(q, 1 / counts.sum())
    inside = p > 0
    return float(np.sum(p[inside] * np.log(p[inside] / q[inside])))
