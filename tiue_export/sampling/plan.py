"""Faster Diffusion as data: which steps run the encoder, and what each group of steps needs.

Faster Diffusion (Li et al., NeurIPS 2024) runs the encoder of an undistilled UNet at a few key
steps and lets the decoders of the steps between work on the features of the last one. The steps
from a key step to the next are a group; their decoders are independent of each other, so they run
as one batch.

Deterministic samplers are linear: the sample before any step is a fixed combination of the initial
noise and of the network's outputs so far. A plan holds that combination for the start of every
group, so that a device needs no scheduler; the final one is the bundle's `Schedule`, of which TiUE
is the case with a single group. The key steps of the paper are its Table 5 and code ("50ls").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tiue_export.errors import ScheduleError, UsageError, unknown_name
from tiue_export.sampling.schedule import Schedule, ddim_steps

SCHEDULERS = ("ddim", "dpmpp", "pndm")
DEFAULT_STEPS = {"ddim": 50, "dpmpp": 20, "pndm": 50}
PLACEMENTS = ("parallel", "sequential")
DEFAULT_GUIDANCE = 7.5
GUIDANCE_RANGE = (1.0, 1000.0)
INJECTION_STRENGTH = 0.003
INJECTION_BELOW = 0.5
_NONUNIFORM = (0, 1, 2, 3, 5, 10, 15, 25, 35)
# 50 steps; PNDM makes 51 calls of them.
_NONUNIFORM_CALLS = 51
# Samplers people ask for that cannot serve here, and why.
_REFUSED = {
    **dict.fromkeys(
        ("euler", "lms", "heun", "kdpm2", "dpm2", "edm"),
        "scales the network's input at every step, so features cannot be shared between steps",
    ),
    **dict.fromkeys(
        ("euler-a", "ddpm", "dpmpp-sde", "sde-dpmpp", "lcm", "tcd"),
        "draws fresh noise at every step; a plan needs a deterministic sampler",
    ),
}

Weights = npt.NDArray[np.float64]
# (step number, sample, output) -> next sample, linear in both.
Step = Callable[[int, Weights, Weights], Weights]


@dataclass(frozen=True)
class Injection:
    """Prior noise injection: sample += `strength` * initial noise where t / 1000 < `below`.

    `placement` "parallel" adds it after the network and before the scheduler's step, as the
    batched published code does: the encoder never sees its own step's addition. "sequential" adds
    it before the network.
    """

    strength: float = INJECTION_STRENGTH
    below: float = INJECTION_BELOW
    placement: str = "parallel"


@dataclass(frozen=True)
class Group:
    """One key step and the steps that use its features.

    The encoder runs at `timesteps[0]` on noise_coefficient * noise + sum over the steps before of
    output_coefficients[i] * outputs[i]; decoder row k is conditioned on `timesteps[k]`.
    """

    first_step: int
    timesteps: tuple[int, ...]
    noise_coefficient: float
    output_coefficients: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Decoder rows for one sample without guidance."""
        return len(self.timesteps)


@dataclass(frozen=True)
class FasterPlan:
    """All that the loop needs beside the graphs and the final `Schedule`.

    `guidance` is the default scale; `max_decoder_rows` bounds the rows of one decoder run (a group
    is then cut into exact pieces); `chosen_by` says where the key steps come from.
    """

    scheduler: str
    groups: tuple[Group, ...]
    guidance: float = DEFAULT_GUIDANCE
    injection: Injection | None = None
    max_decoder_rows: int | None = None
    chosen_by: str = ""

    @property
    def key_steps(self) -> tuple[int, ...]:
        """Numbers of the steps that run the encoder, counted from 0."""
        return tuple(group.first_step for group in self.groups)

    def bounded(self, steps: int | None, rows_per_step: int) -> FasterPlan:
        """The same plan for a decoder that takes at most `steps` steps at once; None is any number.

        Longer groups are cut, which is exact.
        """
        if steps is None:
            return self
        rows = steps * rows_per_step
        own = rows if self.max_decoder_rows is None else self.max_decoder_rows
        return replace(self, max_decoder_rows=min(rows, own))

    def problem(self, schedule: Schedule) -> str | None:
        """What makes plan and schedule contradict each other, or None."""
        expected = 0
        for group in self.groups:
            if group.first_step != expected or not group.timesteps:
                return f"a group starts at step {group.first_step}; expected {expected}"
            if len(group.output_coefficients) != group.first_step:
                return (
                    f"the group at step {expected} has {len(group.output_coefficients)} "
                    f"coefficients; expected {group.first_step}"
                )
            expected += group.rows
        listed = tuple(t for group in self.groups for t in group.timesteps)
        if listed != schedule.timesteps:
            return f"the groups cover {len(listed)} timesteps, the schedule {schedule.rows}"
        return None


@dataclass(frozen=True)
class Trajectory:
    """A sampler's steps as linear algebra.

    `weights` (n + 1, n + 1): row i is the sample before step i, row n the final latents; column 0
    weighs the noise, column k + 1 the output of step k. `entering` (n,) is what injection adds to
    the noise's weight at each step before the scheduler's step.
    """

    timesteps: tuple[int, ...]
    weights: Weights
    entering: Weights


def trace(timesteps: Sequence[int], step: Step, injection: Injection | None) -> Trajectory:
    """Run a sampler once on unit vectors: noise = e_0, output k = e_{k+1}, all exact."""
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
    return Trajectory(tuple(int(t) for t in timesteps), weights, entering)


def ddim_trajectory(
    config: Mapping[str, Any], steps: int, injection: Injection | None = None
) -> Trajectory:
    """DDIM (eta 0) from a diffusers scheduler configuration, float64.

    Per group this is the telescoped closed form: z_out = sqrt(a_e / a_s) z_s + sum_k sqrt(a_e)
    (sqrt(1/a_{k+1} - 1) - sqrt(1/a_k - 1)) eps_k + the injected noise. Raises `ScheduleError`.
    """
    listed = ddim_steps(config, steps)

    def step(k: int, sample: Weights, output: Weights) -> Weights:
        return listed[k].kept * sample + listed[k].added * output

    return trace([item.timestep for item in listed], step, injection)


def check_scheduler(name: str) -> None:
    """Refuse a sampler that no plan can hold, saying why where it is a known one."""
    if name in SCHEDULERS:
        return
    if name in _REFUSED:
        raise ScheduleError(
            f"--scheduler {name} {_REFUSED[name]}",
            f"Use --scheduler {', '.join(SCHEDULERS[:-1])} or {SCHEDULERS[-1]}.",
        )
    raise unknown_name("scheduler", name, SCHEDULERS)


def check_guidance(scale: float) -> None:
    """Refuse a scale that is no number of 1 (off) to 1000."""
    least, most = GUIDANCE_RANGE
    if not least <= scale <= most:
        raise UsageError(f"guidance is {scale:g}; expected 1 (off) to 1000, usually 7.5")


def check_decoder_rows(rows: int | None) -> None:
    """Refuse a bound that leaves no row."""
    if rows is not None and rows < 1:
        raise UsageError(f"--max-decoder-rows is {rows}; expected 1 or more")


def steps_within(rows: int, rows_per_step: int) -> int:
    """How many steps fit into a decoder run of at most so many rows; refuses a bound below one."""
    if rows < rows_per_step:
        raise UsageError(
            f"at most {rows} decoder rows were allowed; one step takes {rows_per_step}",
            f"Allow {rows_per_step} or more, or draw fewer pictures at a time.",
        )
    return rows // rows_per_step


def injection_from(text: str) -> Injection | None:
    """`--inject`: off, on (as parallel), parallel, sequential."""
    if text == "off":
        return None
    placement = "parallel" if text == "on" else text
    if placement not in PLACEMENTS:
        raise unknown_name("injection", text, ("off", "on", *PLACEMENTS))
    return Injection(placement=placement)


def key_steps_from(text: str, steps: int) -> tuple[int, ...]:
    """`--key-steps`: nonuniform, uniform:N or a list such as 0,1,2,3,5,10 -> step numbers.

    `steps` counts the network's calls: PNDM makes one more than it was asked for. The published
    list is for 50 steps; fewer cut it off (as its authors do for 20), more stretch it.
    """
    if text == "nonuniform":
        scale = max(1.0, steps / _NONUNIFORM_CALLS)
        return tuple(sorted({round(i * scale) for i in _NONUNIFORM if round(i * scale) < steps}))
    if text.startswith("uniform:"):
        stride = _whole(text.removeprefix("uniform:"), text)
        if stride < 1:
            raise UsageError(f"--key-steps is {text}; expected a stride of 1 or more")
        return tuple(range(0, steps, stride))
    listed = tuple(_whole(part, text) for part in text.split(","))
    return checked_key_steps(listed, steps)


def _whole(part: str, text: str) -> int:
    try:
        return int(part)
    except ValueError as error:
        raise UsageError(
            f"--key-steps is {text!r}; expected nonuniform, uniform:N, auto or step numbers",
            "Such as --key-steps 0,1,2,3,5,10,15,25,35",
        ) from error


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


def make_plan(
    scheduler: str,
    trajectory: Trajectory,
    key_steps: Sequence[int],
    *,
    steps: int,
    prediction_type: str,
    timestep_spacing: str,
    guidance: float = DEFAULT_GUIDANCE,
    injection: Injection | None = None,
    max_decoder_rows: int | None = None,
    chosen_by: str = "",
) -> tuple[Schedule, FasterPlan]:
    """Cut a trajectory into groups: the final combination, and the start of every group.

    `steps` is what the sampler was asked for. Raises `UsageError` for key steps, guidance or rows
    that cannot be.
    """
    count = len(trajectory.timesteps)
    starts = checked_key_steps(key_steps, count)
    check_guidance(guidance)
    check_decoder_rows(max_decoder_rows)
    seen = injection is not None and injection.placement == "sequential"
    groups = []
    for start, end in zip(starts, (*starts[1:], count), strict=True):
        row = trajectory.weights[start]
        groups.append(
            Group(
                first_step=start,
                timesteps=trajectory.timesteps[start:end],
                noise_coefficient=float(row[0] + (trajectory.entering[start] if seen else 0.0)),
                output_coefficients=tuple(float(w) for w in row[1 : start + 1]),
            )
        )
    final = trajectory.weights[count]
    schedule = Schedule(
        steps=steps,
        timesteps=trajectory.timesteps,
        prediction_type=prediction_type,
        noise_coefficient=float(final[0]),
        output_coefficients=tuple(float(w) for w in final[1:]),
        timestep_spacing=timestep_spacing,
    )
    plan = FasterPlan(
        scheduler=scheduler,
        groups=tuple(groups),
        guidance=float(guidance),
        injection=injection,
        max_decoder_rows=max_decoder_rows,
        chosen_by=chosen_by,
    )
    return schedule, plan
