"""A linear sampler's steps as numbers, and the plan that they make when cut at key steps.

Every sample on the way is a fixed combination of the initial noise, of the network's outputs so
far and of the fresh noises drawn so far. The steps from a key step to the next are a group: their
decoders work on the features of the key step, do not depend on each other, and run as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tiue_export.errors import UsageError
from tiue_export.sampling.plan import Combination, Injection, Pass, Timestep

Weights = npt.NDArray[np.float64]
# (step number, sample, output) -> next sample, linear in both.
Step = Callable[[int, Weights, Weights], Weights]


@dataclass(frozen=True)
class LinearStep:
    """One step: the network sees `scale` * sample at `timestep`, and the next sample is
    `kept` * sample + `added` * output + `fresh` * fresh noise."""

    timestep: Timestep
    kept: float
    added: float
    fresh: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Trajectory:
    """A sampler's n steps, which draw f fresh noises, as linear algebra.

    `weights` (n + 1, 1 + n + f): row i is the sample before step i, row n the final latents; column
    0 weighs the initial noise, column k + 1 the output of step k, column 1 + n + j fresh noise j.
    `scales` (n,) is what the network's input is multiplied by, `drawn` (n + 1,) how many fresh
    noises there are before each step. `entering` (n,) is what injection adds to the initial noise's
    weight at each step before the scheduler's step.
    """

    timesteps: tuple[Timestep, ...]
    weights: Weights
    scales: Weights
    drawn: tuple[int, ...]
    entering: Weights

    def combination(self, row: int, scale: float = 1.0, noise: float = 0.0) -> Combination:
        """The sample before a step times `scale`, `noise` added to the initial noise's weight."""
        count = len(self.timesteps)
        weights = scale * self.weights[row]
        outputs, fresh = weights[1 : 1 + row], weights[1 + count : 1 + count + self.drawn[row]]
        return Combination(
            float(weights[0] + noise), tuple(map(float, outputs)), tuple(map(float, fresh))
        )


def trace(timesteps: Sequence[Timestep], step: Step, injection: Injection | None) -> Trajectory:
    """Run a deterministic sampler once on unit vectors: noise = e_0, output k = e_{k+1}."""
    count = len(timesteps)
    basis = np.eye(count + 1)
    weights, entering = np.zeros((count + 1, count + 1)), np.zeros(count)
    sample = basis[0]
    for k, timestep in enumerate(timesteps):
        weights[k] = sample
        if injection is not None and timestep / 1000 < injection.below:
            entering[k] = injection.strength
        sample = step(k, sample + entering[k] * basis[0], basis[k + 1])
    weights[count] = sample
    return Trajectory(tuple(timesteps), weights, np.ones(count), (0,) * (count + 1), entering)


def linear_trajectory(start: float, steps: Sequence[LinearStep]) -> Trajectory:
    """The trajectory of steps that begin at `start` * initial noise."""
    count = len(steps)
    noises = [k for k, step in enumerate(steps) if step.fresh != 0]
    basis = np.eye(1 + count + len(noises))
    rows, drawn, sample = [], [0], start * basis[0]
    for k, step in enumerate(steps):
        rows.append(sample)
        sample = step.kept * sample + step.added * basis[1 + k]
        if step.fresh != 0:
            sample = sample + step.fresh * basis[1 + count + noises.index(k)]
        drawn.append(drawn[-1] + (step.fresh != 0))
    scales = np.array([step.scale for step in steps])
    timesteps = tuple(step.timestep for step in steps)
    return Trajectory(timesteps, np.array([*rows, sample]), scales, tuple(drawn), np.zeros(count))


def checked_key_steps(key_steps: Sequence[int], steps: int) -> tuple[int, ...]:
    """Refuse key steps that leave a step without features or are none of the steps."""
    given = ",".join(map(str, key_steps))
    if not key_steps or key_steps[0] != 0:
        raise UsageError(
            f"--key-steps {given} does not start at 0: the first step has no features to use",
            f"Type --key-steps 0,{given}" if key_steps and min(key_steps) > 0 else None,
        )
    if any(b <= a for a, b in pairwise(key_steps)):
        ordered = ",".join(map(str, sorted(set(key_steps))))
        raise UsageError(
            f"--key-steps {given} is not in rising order", f"Type --key-steps {ordered}"
        )
    if key_steps[-1] >= steps:
        raise UsageError(
            f"--key-steps ends at {key_steps[-1]}; there are {steps} steps, 0 to {steps - 1}",
            "Shorten the list, or raise --steps.",
        )
    return tuple(key_steps)


def key_steps_after(first: int, key_steps: Sequence[int]) -> tuple[int, ...]:
    """A whole sampler's key steps as those of what is left from step `first` on.

    The first step that is left takes the place of the key steps before it.
    """
    if not first:
        return tuple(key_steps)
    return tuple(sorted({max(key, first) - first for key in key_steps}))


def passes_of(
    trajectory: Trajectory, key_steps: Sequence[int], *, injected: bool = False
) -> tuple[Pass, ...]:
    """One pass for each key step and the steps up to the next.

    `injected`: the encoder sees its own step's injection. Raises `UsageError` for key steps that
    cannot be.
    """
    count = len(trajectory.timesteps)
    starts = checked_key_steps(key_steps, count)
    passes = []
    for start, end in zip(starts, (*starts[1:], count), strict=True):
        entering = float(trajectory.entering[start]) if injected else 0.0
        terms = trajectory.combination(start, float(trajectory.scales[start]), entering)
        timesteps = trajectory.timesteps[start:end]
        passes.append(Pass(timesteps[0], timesteps, terms))
    return tuple(passes)
