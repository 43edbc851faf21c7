"""Faster Diffusion's plans: which steps run the encoder, and what each group of steps needs.

Faster Diffusion (Li et al., NeurIPS 2024) runs the encoder of an undistilled UNet at a few key
steps and lets the decoders of the steps between work on the features of the last one. The steps
from a key step to the next are a group; their decoders are independent of each other, so they run
as one batch.

Deterministic samplers are linear: the sample before any step is a fixed combination of the initial
noise and of the network's outputs so far. Each group is a pass of the plan. The key steps of the
paper are its Table 5 and code ("50ls").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiue_export.errors import ScheduleError, UsageError, unknown_name
from tiue_export.sampling.ddim import ddim_steps
from tiue_export.sampling.plan import (
    DEFAULT_GUIDANCE,
    Injection,
    Plan,
    check_decoder_rows,
    check_guidance,
)
from tiue_export.sampling.trajectory import (
    Trajectory,
    Weights,
    checked_key_steps,
    passes_of,
    trace,
)

SCHEDULERS = ("ddim", "dpmpp", "pndm")
DEFAULT_STEPS = {"ddim": 50, "dpmpp": 20, "pndm": 50}
PLACEMENTS = ("parallel", "sequential")
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
        "draws fresh noise at every step; Faster Diffusion needs a deterministic sampler",
    ),
}


def ddim_trajectory(
    config: Mapping[str, Any], steps: int, injection: Injection | None = None, first: int = 0
) -> Trajectory:
    """DDIM (eta 0) from a diffusers scheduler configuration, float64, from step `first` on.

    Per group this is the telescoped closed form: z_out = sqrt(a_e / a_s) z_s + sum_k sqrt(a_e)
    (sqrt(1/a_{k+1} - 1) - sqrt(1/a_k - 1)) eps_k + the injected noise. Raises `ScheduleError`.
    """
    listed = ddim_steps(config, steps)[first:]

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
) -> Plan:
    """Cut a trajectory at its key steps: the input of every pass, and the final combination.

    `steps` is what the sampler was asked for. Raises `UsageError` for key steps, guidance or rows
    that cannot be.
    """
    check_guidance(guidance)
    check_decoder_rows(max_decoder_rows)
    seen = injection is not None and injection.placement == "sequential"
    passes = passes_of(trajectory, key_steps, injected=seen)
    return Plan(
        method="faster",
        steps=steps,
        passes=passes,
        latents=trajectory.combination(len(trajectory.timesteps)),
        prediction_type=prediction_type,
        scheduler=scheduler,
        timestep_spacing=timestep_spacing,
        guidance=float(guidance),
        injection=injection,
        max_decoder_rows=max_decoder_rows,
        chosen_by=chosen_by,
    )
