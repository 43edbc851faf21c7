"""Key steps by evidence: of all lists with so many encoder runs, the one that loses least.

The loss of a plan is modelled as the sum of its groups' losses, each measured with every earlier
step a key step. Sums over consecutive groups are minimised exactly by dynamic programming.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tiue_export.errors import UsageError
from tiue_export.specs import Array


@dataclass(frozen=True)
class Choice:
    """Key steps, and the loss that the measurement gives them."""

    key_steps: tuple[int, ...]
    loss: float


def choose_key_steps(losses: Array, encoder_runs: int) -> Choice:
    """The best at most `encoder_runs` key steps for losses (n + 1, n + 1).

    losses[s, e] is what the group of the steps s .. e - 1 costs, infinite where it was not
    measured. Raises `UsageError` when so few runs cannot cover the steps within what was measured.
    """
    count = len(losses) - 1
    best = np.full((encoder_runs + 1, count + 1), np.inf)
    best[0, 0] = 0.0
    chosen = np.zeros((encoder_runs + 1, count + 1), np.int64)
    for runs in range(1, encoder_runs + 1):
        for end in range(1, count + 1):
            totals = best[runs - 1, :end] + losses[:end, end]
            chosen[runs, end] = int(np.argmin(totals))
            best[runs, end] = totals[chosen[runs, end]]
    runs = int(np.argmin(best[:, count]))
    loss = float(best[runs, count])
    if not np.isfinite(loss):
        raise UsageError(
            f"{encoder_runs} encoder runs cannot cover {count} steps with the groups measured",
            "Measure longer groups (--reach), or raise --budget.",
        )
    key_steps, end = [], count
    for number in range(runs, 0, -1):
        end = int(chosen[number, end])
        key_steps.append(end)
    return Choice(tuple(reversed(key_steps)), loss)


def loss_of(losses: Array, key_steps: tuple[int, ...]) -> float:
    """The modelled loss of given key steps."""
    ends = (*key_steps[1:], len(losses) - 1)
    return float(sum(losses[s, e] for s, e in zip(key_steps, ends, strict=True)))


def encoder_runs_within(budget: float, steps: int, encoder_share: float) -> int:
    """How many encoder runs a share `budget` of plain sampling's operations pays for.

    The decoders run at every step; `encoder_share` is the encoder's part of one UNet pass.
    """
    least = 1 - encoder_share + encoder_share / steps
    if not least <= budget <= 1:
        raise UsageError(
            f"--budget is {budget:g}; expected {least:.3f} (one encoder run, {steps} decoder "
            "steps) to 1 (plain sampling)",
            "The published key steps cost 0.733 at 50 steps.",
        )
    # A share of 0.3 must not lose a run to rounding.
    return min(steps, int((budget - (1 - encoder_share)) * steps / encoder_share + 1e-9))


def cost_of(encoder_runs: int, steps: int, encoder_share: float) -> float:
    """The share of plain sampling's operations that so many encoder runs come to."""
    return 1 - encoder_share + encoder_share * encoder_runs / steps
