"""A sampler as data: what each pass of the network is fed, and how its outputs add up to latents.

Every sampler here is linear in the initial noise, in the network's outputs and in the fresh noises
it draws on the way. So a plan of passes with coefficients is all that a device needs; nothing on it
knows a scheduler, and one loop (`sampler.py`) runs every plan:

| method | passes | rows of a pass | guidance |
|---|---|---|---|
| TiUE | 1 | K | distilled in |
| one step | 1 | 1 | distilled in |
| few steps | one a step, fresh noise between them | 1 | distilled in |
| Faster Diffusion | one a key step | the steps that use its features | a scale |

In a plan of one pass without guidance the timesteps and the sum are constants of the graphs,
unless its time is left open, so that a decoder can take its rows piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tiue_export.errors import UsageError
from tiue_export.sampling.fan_out import FanOut

DEFAULT_GUIDANCE = 7.5
GUIDANCE_RANGE = (1.0, 1000.0)
INJECTION_STRENGTH = 0.003
INJECTION_BELOW = 0.5
# Whole but for rectified flow, whose time is continuous.
Timestep = int | float


@dataclass(frozen=True)
class Combination:
    """noise * initial noise + sum_i outputs[i] * output i + sum_j fresh[j] * fresh noise j.

    Outputs are counted over all rows of all passes, in order; there are as many coefficients as
    there are outputs and fresh noises by then.
    """

    noise: float
    outputs: tuple[float, ...] = ()
    fresh: tuple[float, ...] = ()


@dataclass(frozen=True)
class Pass:
    """One pass: the encoder runs on `input` at `encoder_timestep`, decoder row k at `timesteps[k]`.

    The rows of a pass share the encoder's features and do not depend on each other.
    """

    encoder_timestep: Timestep
    timesteps: tuple[Timestep, ...]
    input: Combination

    @property
    def first_row(self) -> int:
        """The number of rows that earlier passes computed."""
        return len(self.input.outputs)

    @property
    def rows(self) -> int:
        """Decoder rows for one sample without guidance."""
        return len(self.timesteps)


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
class Plan:
    """All that drawing needs beside the graphs.

    `method` names where the plan comes from, for people; nothing asks it. `steps` is what the
    sampler was asked for (K of a TiUE student). `guidance` is the default scale; None: it is
    distilled in, and the network runs on B rows, not 2B. `merged_timesteps` names rows that were
    dropped, their weight added to a neighbour. `max_decoder_rows` bounds the rows of one decoder
    run: a pass is then cut into exact pieces. `recipe` names the few-step student's recipe
    (`recipes.py`), `eta` its share of fresh noise, and `embedded_guidance` the scale that is folded
    into its time embedding. `fan_out` is where the rows of one pass part. `open_time`: the
    timesteps of a single pass are inputs of the graphs all the same, as those of several passes
    are. `chosen_by` says what chose the key steps or the fan-out.
    """

    method: str
    steps: int
    passes: tuple[Pass, ...]
    latents: Combination
    prediction_type: str
    scheduler: str = "ddim"
    timestep_spacing: str = "leading"
    guidance: float | None = None
    merged_timesteps: tuple[Timestep, ...] = ()
    injection: Injection | None = None
    max_decoder_rows: int | None = None
    chosen_by: str = ""
    recipe: str = ""
    eta: float = 0.0
    embedded_guidance: float | None = None
    fan_out: FanOut = field(default_factory=FanOut)
    open_time: bool = False

    @property
    def one_pass(self) -> bool:
        """Whether graphs hold the timesteps and the final sum as constants.

        Not of a single pass in `open_time`: there the sum is the device's.
        """
        single = len(self.passes) == 1 and self.guidance is None and not self.latents.fresh
        return single and not self.open_time

    @property
    def timesteps(self) -> tuple[Timestep, ...]:
        """The timestep of every decoder row, in order."""
        return tuple(t for one in self.passes for t in one.timesteps)

    @property
    def rows(self) -> int:
        """Decoder rows that are computed for one sample without guidance."""
        return len(self.timesteps)

    @property
    def key_steps(self) -> tuple[int, ...]:
        """Numbers of the rows at which the encoder runs, counted from 0."""
        return tuple(one.first_row for one in self.passes)

    @property
    def open_rows(self) -> bool:
        """Whether the rows of a pass are an open axis of the decoder's graph.

        With guidance a bundle may be drawn by another plan; a student's passes stay what they are.
        """
        return self.guidance is not None or any(one.rows > 1 for one in self.passes)

    @property
    def noises(self) -> int:
        """How many noises a picture draws: the initial one, and the fresh ones."""
        return 1 + len(self.latents.fresh)

    @property
    def copies(self) -> int:
        """Rows of the network for one picture: 2 with guidance (without and with the prompt)."""
        return 1 if self.guidance is None else 2

    def merged(self, below: float) -> Plan:
        """Drop rows whose |E_t| < `below`, adding their weight to the neighbouring kept row.

        The error is |E_t| * |output_t - output_neighbour|: with K=4 the last row weighs 0.012.
        Only the rows of a single pass may merge: between passes every row counts.
        """
        if not 0 <= below < math.inf:
            raise UsageError(f"--merge-below is {below}; expected 0 or more (0.02 is usual)")
        if below == 0:
            return self
        if not self.one_pass:
            raise UsageError(
                "rows merge in one pass only: between passes every row counts",
                "Leave --merge-below out.",
            )
        timesteps = list(self.timesteps)
        weights = list(self.latents.outputs)
        dropped: list[Timestep] = []
        for row in range(len(timesteps) - 1, 0, -1):
            if abs(weights[row]) < below:
                weights[row - 1] += weights[row]
                dropped.insert(0, timesteps[row])
                del timesteps[row], weights[row]
        return replace(
            self,
            passes=(replace(self.passes[0], timesteps=tuple(timesteps)),),
            latents=replace(self.latents, outputs=tuple(weights)),
            merged_timesteps=(*self.merged_timesteps, *dropped),
        )

    def in_pieces(self, max_decoder_rows: int | None) -> Plan:
        """The rows of a single pass in decoder runs of at most so many; exact.

        Where all fit into one run, and without a bound, the plan stays what it is.
        """
        check_decoder_rows(max_decoder_rows)
        if max_decoder_rows is None or max_decoder_rows >= self.rows:
            return self
        if self.fan_out:
            raise UsageError(
                f"blocks are shared between the rows, which --max-decoder-rows {max_decoder_rows} "
                "would run one after another",
                "Leave --max-decoder-rows out.",
            )
        return replace(self, max_decoder_rows=max_decoder_rows, open_time=True)

    def parting_at(self, fan_out: FanOut) -> Plan:
        """Rows of one pass that part at `fan_out`; refused in several passes."""
        if not self.one_pass:
            raise UsageError(
                "rows part late in one pass only: between passes every row counts",
                "Leave --fan-out out.",
            )
        return replace(self, fan_out=fan_out)

    def collapsed(self) -> Plan:
        """Rows that differ in nothing as a single one, which weighs what all of them did."""
        return replace(
            self,
            passes=(replace(self.passes[0], timesteps=self.timesteps[:1]),),
            latents=replace(self.latents, outputs=(math.fsum(self.latents.outputs),)),
            merged_timesteps=(*self.timesteps[1:], *self.merged_timesteps),
        )

    def bounded(self, steps: int | None, rows_per_step: int) -> Plan:
        """The same plan for a decoder that takes at most `steps` steps at once; None is any number.

        Longer passes are cut, which is exact.
        """
        if steps is None:
            return self
        rows = steps * rows_per_step
        own = rows if self.max_decoder_rows is None else self.max_decoder_rows
        return replace(self, max_decoder_rows=min(rows, own))

    def problem(self) -> str | None:
        """What makes the plan contradict itself, or None."""
        rows = noises = 0
        if not self.passes:
            return "it has no pass"
        for number, one in enumerate(self.passes):
            if not one.timesteps:
                return f"pass {number} has no timestep"
            if one.first_row != rows:
                return f"pass {number} starts at row {one.first_row}; expected {rows}"
            if len(one.input.fresh) < noises:
                return f"pass {number} knows {len(one.input.fresh)} fresh noises; expected {noises}"
            rows, noises = rows + one.rows, len(one.input.fresh)
        if len(self.latents.outputs) != rows:
            return f"the latents have {len(self.latents.outputs)} coefficients for {rows} rows"
        if len(self.latents.fresh) < noises:
            return f"the latents know {len(self.latents.fresh)} fresh noises; expected {noises}"
        only = self.passes[0]
        if self.one_pass and only.encoder_timestep != only.timesteps[0]:
            return "its only pass does not start at its first timestep"
        if self.fan_out < FanOut() or (self.fan_out and not self.one_pass):
            return f"its rows part at {self.fan_out}, in {len(self.passes)} passes"
        return None


def single_pass(
    method: str,
    steps: int,
    timesteps: Sequence[Timestep],
    latents: Combination,
    prediction_type: str,
    timestep_spacing: str = "leading",
) -> Plan:
    """The plan of a student that draws in one pass from the initial noise."""
    return Plan(
        method=method,
        steps=steps,
        passes=(Pass(timesteps[0], tuple(timesteps), Combination(1.0)),),
        latents=latents,
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
    )


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
