"""What an analysis of key steps measured, by prompt and by list of key steps, and its JSON file.

Definitions: change = mean of the squared difference over channels and positions; norm = Frobenius
norm of the mean over channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from tiue_export.bundle.manifest import structured
from tiue_export.errors import BundleError, UsageError
from tiue_export.specs import Array
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.json_file import read_json

RESULT_FILE = "analysis.json"


@dataclass(frozen=True)
class AnalysisRequest:
    """All that decides the numbers of one prompt; `sha256` is the UNet's, adapters included."""

    sha256: str
    scheduler: str
    steps: int
    guidance: float
    reach: int


@dataclass(frozen=True)
class BlockCurves:
    """One block along a run of T steps: `change` (T - 1,) between neighbours, `norm` (T,)."""

    change: tuple[float, ...]
    norm: tuple[float, ...]


@dataclass(frozen=True)
class PromptResult:
    """One prompt: its blocks, and the losses (n + 1, n + 1) of all groups, None where infinite."""

    prompt: str
    seed: int
    duration_s: float
    blocks: Mapping[str, BlockCurves]
    losses: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Candidate:
    """Key steps, the share of plain sampling's operations, and what they cost.

    `predicted` is the sum of the measured groups, `deviation` the RMS difference of the latents
    from plain sampling over their RMS, on each prompt that was held out.
    """

    name: str
    key_steps: tuple[int, ...]
    flops_share: float
    predicted: float
    deviation: tuple[float, ...]


def losses_of(results: Sequence[PromptResult]) -> Array:
    """Mean losses (n + 1, n + 1) over prompts."""
    tables = [[[np.inf if x is None else x for x in row] for row in r.losses] for r in results]
    mean: Array = np.mean(np.array(tables, np.float64), axis=0)
    return mean


def read_results(path: Path, request: AnalysisRequest) -> list[PromptResult]:
    """What a result file of the same request holds; none where there is no file.

    Raises `UsageError` when the file is something else, or answers another request.
    """
    if not path.exists():
        return []
    try:
        data = read_json(path)
        found = dict(data["request"])
        listed: tuple[PromptResult, ...] = structured(
            tuple[PromptResult, ...], data["prompts"], str(path)
        )
    except (OSError, ValueError, KeyError, TypeError, BundleError) as error:
        raise UsageError(
            f"{path} exists and is no result of this analysis",
            "Choose another --out, or pass --force to replace it.",
        ) from error
    wanted = asdict(request)
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        raise UsageError(
            f"{path} holds an analysis with another {', another '.join(changed)}",
            "Choose another --out, or pass --force to measure anew.",
        )
    return list(listed)


def write_results(
    path: Path,
    request: AnalysisRequest,
    results: Sequence[PromptResult],
    found: Sequence[Candidate] = (),
    encoder_share: float | None = None,
) -> None:
    """Replace the result file in one step."""
    data = {
        "what": "block changes along plain sampling, and what sharing an encoder run costs",
        "request": asdict(request),
        "encoder_share": encoder_share,
        "candidates": [asdict(candidate) for candidate in found],
        "prompts": [asdict(result) for result in results],
    }
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(data, allow_nan=False) + "\n").encode())
