"""Measures of picture quality as pure functions of features, embeddings and pixels.

The kernel distance is torchmetrics' own, fed with our features in place of Inception's (its
classes take any module as `feature`; neither torchvision nor torch-fidelity is needed for that).
Its Fréchet distance takes eigenvalues of a product of covariances, which LAPACK gives up on when
pictures repeat; ours keeps to symmetric matrices. Precision, recall, density and coverage are the
prdc package's.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tiue_export.errors import UsageError
from tiue_export.specs import Array

# Neighbours that span a manifold, as Kynkäänniemi et al. took. There must be more real pictures of
# each name than that: with 2 of each and 5 neighbours, noise measured a precision of 1.00; with 8
# and 3 it measures 0.02, and real pictures 0.96.
NEAREST = 3
_KERNEL_SUBSETS = 100
_KERNEL_SUBSET_SIZE = 200
_FRAME_PX = 3


@dataclass(frozen=True)
class ManifoldScores:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

    precision: float
    recall: float
    density: float
    coverage: float


def retrieval_share(embeddings: Array, prototypes: Array, names: Array, top: int) -> float:
    """Share of pictures whose own prototype is among their `top` nearest, by cosine.

    Unit vectors: `embeddings` (N, D), `prototypes` (C, D); `names` (N,) are rows of `prototypes`.
    A tie counts against the picture, so that a network that sees no difference scores nothing.
    """
    cosines = embeddings @ prototypes.T  # (N, C)
    own = cosines[np.arange(len(names)), names]
    nearer = (cosines >= own[:, None]).sum(1) - 1
    return float((nearer < top).mean())


def frechet_distance(real: Array, drawn: Array) -> float:
    """Squared Fréchet distance of Gaussians fitted to features (R, D) and (N, D) (Heusel et al.).

    Biased upwards for few pictures: compare only values of equal N.
    """
    _require_pictures(min(len(real), len(drawn)), 2, "the Fréchet distance")
    means = [np.mean(features, axis=0, dtype=np.float64) for features in (real, drawn)]
    one, other = (np.cov(np.asarray(f, np.float64), rowvar=False) for f in (real, drawn))  # (D, D)
    values, vectors = np.linalg.eigh(np.atleast_2d(one))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # tr sqrt(AB) = tr sqrt(sqrt(A) B sqrt(A)), and that one is symmetric.
    shared = np.linalg.eigvalsh(root @ np.atleast_2d(other) @ root)
    spread = np.trace(np.atleast_2d(one)) + np.trace(np.atleast_2d(other))
    spread -= 2 * np.sqrt(np.maximum(shared, 0)).sum()
    return max(0.0, float(((means[0] - means[1]) ** 2).sum() + spread))


def kernel_distance(real: Array, drawn: Array, seed: int = 0) -> tuple[float, float]:
    """Squared MMD with the kernel (x.y/D + 1)^3 (Binkowski et al. 2018): mean and deviation.

    Unbiased in the number of pictures; over 100 random subsets of 200, or as many as there are.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(_KERNEL_SUBSET_SIZE, len(real), len(drawn))
    _require_pictures(size, 2, "the kernel distance")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        metric = KernelInceptionDistance(
            feature=_Given(real.shape[1]), subsets=_KERNEL_SUBSETS, subset_size=size
        )
        metric.update(_wide(real), real=True)
        metric.update(_wide(drawn), real=False)
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def manifold_scores(real: Array, drawn: Array, nearest: int = NEAREST) -> ManifoldScores:
    """How much of what was drawn looks real, and how much of the real is drawn, from features."""
    from prdc import compute_prdc

    _require_pictures(min(len(real), len(drawn)), nearest + 2, "precision and recall")
    with contextlib.redirect_stdout(io.StringIO()):  # prdc prints its counts
        scores = compute_prdc(real, drawn, nearest)
    return ManifoldScores(**{name: float(value) for name, value in scores.items()})


def diversity(groups: Array) -> float | None:
    """Mean distance of two pictures of one prompt, per root of dimension; None for one seed.

    `groups` (P, S, ...): P prompts, S seeds, then features or pixels.
    """
    prompts, seeds = groups.shape[:2]
    if seeds < 2:
        return None
    rows = groups.reshape(prompts, seeds, -1).astype(np.float64)
    distances = [
        np.sqrt(np.mean((rows[:, a] - rows[:, b]) ** 2, axis=1))
        for a in range(seeds)
        for b in range(a)
    ]
    return float(np.mean(distances))


def mean_cosine(texts: Array, pictures: Array) -> float:
    """Mean cosine of each text (N, D) with its own picture (N, D); unit vectors."""
    return float((texts * pictures).sum(1).mean())


def ground_colours(pictures: Array, frame_px: int = _FRAME_PX) -> Array:
    """Median colour of each picture's frame: uint8 (N, H, W, 3) -> float64 (N, 3)."""
    inside = np.zeros(pictures.shape[1:3], bool)
    inside[frame_px:-frame_px, frame_px:-frame_px] = True
    colours: Array = np.median(pictures[:, ~inside], axis=1)
    return colours


def ground_share(
    pictures: Array, named: Sequence[str | None], grounds: Mapping[str, tuple[int, int, int]]
) -> float | None:
    """Share of pictures whose frame is nearest to the ground their prompt names (RGB distance).

    Pictures whose prompt names none are left out; None when no prompt names one.
    """
    chosen = [row for row, name in enumerate(named) if name is not None]
    if not chosen:
        return None
    palette = np.array(list(grounds.values()), np.float64)  # (G, 3)
    colours = ground_colours(pictures[chosen])
    nearest = np.linalg.norm(colours[:, None] - palette[None], axis=2).argmin(1)
    order = list(grounds)
    return float(np.mean([order[i] == named[row] for i, row in zip(nearest, chosen, strict=True)]))


def row_shares(norms: Array) -> tuple[float, ...]:
    """Norms |E_k| * ||output_k|| of (N, K) decoder rows -> their mean shares, which add up to 1."""
    shares = norms / norms.sum(1, keepdims=True)
    return tuple(float(share) for share in shares.mean(0))


class _Given(nn.Module):
    """Features that were computed already, where torchmetrics expects a network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _wide(features: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features, np.float64))


def _require_pictures(got: int, wanted: int, what: str) -> None:
    if got < wanted:
        raise UsageError(
            f"{what} cannot be measured on {got} pictures; it takes at least {wanted}",
            "Ask for more: --prompts 400, or --seeds 4.",
        )
