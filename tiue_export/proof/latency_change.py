"""Times against times: ratios with their interval, and the limit that a change may not pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiue_export.errors import RegressionError, UsageError


@dataclass(frozen=True)
class Ratio:
    """A quotient of two times with its 95 % interval; no interval from a single round."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Change:
    """A contender's time now over its time before, at `stage`; or why there is none.

    `gone`: it was measured before and is not now.
    """

    name: str
    stage: str
    before_ms: float | None = None
    now_ms: float | None = None
    ratio: Ratio | None = None
    reason: str | None = None
    gone: bool = False

    def is_slower(self, limit: float) -> bool:
        """By more than the share `limit`, and by more than the noise between rounds."""
        if self.ratio is None:
            return self.gone
        certain = self.ratio.low is None or self.ratio.low > 1
        return self.ratio.value > 1 + limit and certain


@dataclass(frozen=True)
class Comparison:
    """Two records side by side: a change for each contender, and `notes` of what else differs."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def ratio_text(ratio: Ratio) -> str:
    """A ratio with its interval, as in "0.25 [0.24-0.26]"."""
    shown = f"{ratio.value:.3g}"
    if ratio.low is None or ratio.high is None:
        return shown
    return f"{shown} [{ratio.low:.3g}-{ratio.high:.3g}]"


def parse_limit(text: str) -> float:
    """ "5%" -> 0.05."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 1000:
        raise UsageError(f"--fail-if-slower is {text!r}; expected a percentage such as 5%")
    return percent / 100


def require_not_slower(changes: Sequence[Change], limit: float) -> None:
    """Raise `RegressionError` naming every contender that became slower, or is gone."""
    if not changes:
        raise UsageError(
            "there is nothing to compare", "Give two bundles, or --compare with two records."
        )
    slower = [change for change in changes if change.is_slower(limit)]
    if not slower:
        return
    told = "; ".join(
        f"{change.name}: {change.reason}"
        if change.ratio is None
        else f"{change.name}, {change.stage}: {ratio_text(change.ratio)} times as long"
        for change in slower
    )
    raise RegressionError(
        f"{len(slower)} of {len(changes)} are slower by more than {100 * limit:g} %: {told}",
        "Run it again on an idle machine with more --rounds, or find the cause.",
    )
