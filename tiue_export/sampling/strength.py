"""Which of a sampler's steps are left where it starts from a picture."""

from __future__ import annotations

import math

from tiue_export.errors import UsageError

# diffusers' defaults: of its img2img pipelines, and of those that inpaint.
USUAL_STRENGTH, USUAL_MASKED_STRENGTH = 0.8, 1.0


def first_step(steps: int, strength: float, *, fixed: bool = False) -> int:
    """The number of the first step that is done: the last `steps` * `strength` are.

    As in diffusers' img2img pipelines. Raises `UsageError` where none would be; `fixed`: there is
    no other number of steps to choose.
    """
    check_strength(strength)
    left = min(int(steps * strength), steps)
    if left < 1:
        enough = f"--strength {least_strength(1, steps):g}"
        raise UsageError(
            f"--strength {strength:g} of {_steps(steps)} leaves none to do",
            f"Type {enough}" if fixed else f"Type --steps {least_steps(strength)}, or {enough}",
        )
    return steps - left


def least_strength(left: int, steps: int) -> float:
    """The smallest strength, in thousandths, of which so many of all steps are left."""
    thousandths = -(-1000 * left // steps)
    if int(steps * (thousandths / 1000)) < left:  # 0.58 of 50 is 28.999...
        thousandths += 1
    return thousandths / 1000


def least_steps(strength: float) -> int:
    """The smallest number of steps of which one is left."""
    check_strength(strength)
    steps = math.ceil(1 / strength)
    return steps if int(steps * strength) >= 1 else steps + 1  # rounding of 1 / strength


def check_strength(strength: float) -> None:
    """Refuse what is no share of the noise."""
    if not 0 < strength <= 1:
        raise UsageError(
            f"--strength is {strength:g}; expected more than 0 (the picture stays) to 1 (all new)",
            f"Leave it out for {USUAL_STRENGTH:g}, with a mask {USUAL_MASKED_STRENGTH:g}.",
        )


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
