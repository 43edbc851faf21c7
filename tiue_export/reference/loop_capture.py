"""The fp32 model run through the loop of Faster Diffusion: what its graphs are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from tiue_export.bundle.manifest import ParityRecord
from tiue_export.graphs.build import ExportOptions, build_graphs, run_graph
from tiue_export.methods.scheduler import diffusers_scheduler
from tiue_export.proof.parity import loop_to_check, parity_record
from tiue_export.reference.half_audit import RangeRecorder
from tiue_export.sampling.plan import FasterPlan
from tiue_export.sampling.sampler import OnStep, added, combination, encoder_feeds, guided_outputs
from tiue_export.sampling.schedule import Schedule
from tiue_export.specs import CONTROLNET, UNET_DECODER, UNET_ENCODER, UNET_GRAPHS, Array, Feeds
from tiue_export.student.model import Student

GraphIO = tuple[dict[str, Array], dict[str, Array]]


def capture_loop(
    wide: Student,
    options: ExportOptions,
    known: dict[str, Array],
    graph_io: dict[str, GraphIO],
    inputs: str,
    recorder: RangeRecorder,
    on_step: OnStep = lambda done, total: None,
) -> list[ParityRecord]:
    """Run a float32 model's graphs on one group, and through all; adds to `known` and `graph_io`.

    `known` brings the noise as "sample" (B, 4, H, W) and the text of both halves (2B, L, D).
    Returns the hops on torch's side: rows against the unsplit UNet and the naive decoder, and the
    plan's sums against diffusers' own scheduler.
    """
    plan, noise = wide.plan, known.pop("sample")
    assert plan is not None
    text = known["encoder_hidden_states"]
    graphs = {graph.spec.name: graph for graph in build_graphs(wide, options, only=UNET_GRAPHS)}

    def run(name: str, pool: Feeds) -> Mapping[str, Array]:
        with recorder.watching(graphs[name]):
            graph_io[name] = run_graph(graphs[name], pool)
        return graph_io[name][1]

    control = None
    if CONTROLNET in graphs:
        control = control_to_check(graphs[CONTROLNET].example[3].shape)
        known |= control
    small = loop_to_check(plan, len(text))
    outputs = guided_outputs(
        wide.schedule, small, run, noise, text, on_step=on_step, control=control
    )
    final = wide.schedule
    latents = combination(final.noise_coefficient, final.output_coefficients, noise, outputs)
    # One group is kept as the graphs' own check: the key step and two steps far from it.
    known |= encoder_feeds(plan.groups[0], noise, text)
    known["timesteps"] = np.array(timesteps_to_check(plan), np.float32)
    features = run(UNET_ENCODER, known)
    if control is not None:
        features = added(features, run(CONTROLNET, known))
    pool = {**known, **features}
    known["outputs"] = run(UNET_DECODER, pool)["outputs"]
    known |= {"noise": noise, "latents": latents}
    looped = scheduler_loop(wide, noise, outputs)
    if control is None:
        rows = _hops_of_rows(wide, known, options.hoist, inputs)
    else:
        rows = _hops_of_control(wide, known, inputs)
    name = plan.scheduler
    return [
        *rows,
        parity_record("closed form", f"latents / {name} loop", looped, latents, "split", inputs),
    ]


def timesteps_to_check(plan: FasterPlan) -> tuple[int, ...]:
    """The first key step's timestep, the middle one and the last of all."""
    listed = [t for group in plan.groups for t in group.timesteps]
    return listed[0], listed[len(listed) // 2], listed[-1]


def _hops_of_rows(
    wide: Student, known: Mapping[str, Array], hoist: str, inputs: str
) -> list[ParityRecord]:
    """The key step's rows against the UNet itself, all rows against its own up blocks."""
    sample, text = (torch.from_numpy(known[k]) for k in ("sample", "encoder_hidden_states"))
    timesteps = tuple(int(t) for t in known["timesteps"])
    naive = Student(
        wide.unet,
        _rows_only(wide.schedule, timesteps),
        source=wide.source,
        scheduler_config=wide.scheduler_config,
    )
    with torch.no_grad():
        unsplit = wide.unet(sample, timesteps[0], text).sample.numpy()
        rows = naive.decode(naive.encode(sample, text), text).numpy()
    first = known["outputs"][: len(sample)]
    hop = "lowered" if hoist == "none" else "hoisted"
    return [
        parity_record("split", "key step's rows / unsplit UNet", unsplit, first, "split", inputs),
        parity_record(hop, "outputs / naive decoder", rows, known["outputs"], "split", inputs),
    ]


def _hops_of_control(wide: Student, known: Mapping[str, Array], inputs: str) -> list[ParityRecord]:
    """The key step's rows against diffusers' own ControlNet and UNet."""
    names = ("sample", "encoder_hidden_states", "controlnet_cond")
    sample, text, picture = (torch.from_numpy(known[name]) for name in names)
    timestep, strength = int(known["timestep"][0]), float(known["conditioning_scale"][0])
    assert wide.controlnet is not None
    with torch.no_grad():
        down, mid = wide.controlnet(
            sample,
            timestep,
            text,
            torch.cat([picture, picture]),
            conditioning_scale=strength,
            return_dict=False,
        )
        whole = wide.unet(
            sample,
            timestep,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
    first = known["outputs"][: len(sample)]
    subject = "key step's rows / unsplit UNet and ControlNet"
    return [parity_record("split", subject, whole.numpy(), first, "split", inputs)]


def control_to_check(shape: Sequence[int]) -> dict[str, Array]:
    """A picture of lines (B, 3, 8H, 8W) in [0, 1], as edge ControlNets take, at full strength."""
    rows, _, height, width = shape
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot(y - height / 2, x - width / 2)
    lines = (np.abs(radius - height / 3) < height / 32) | (np.abs(x - width / 4) < width / 64)
    picture = np.broadcast_to(lines.astype(np.float32), (rows, 3, height, width))
    return {
        "controlnet_cond": np.ascontiguousarray(picture),
        "conditioning_scale": np.ones(1, np.float32),
    }


def _rows_only(schedule: Schedule, timesteps: tuple[int, ...]) -> Schedule:
    """For `Student.decode`, which takes its timesteps from the schedule."""
    zeros = (0.0,) * len(timesteps)
    return replace(schedule, timesteps=timesteps, output_coefficients=zeros)


def scheduler_loop(wide: Student, noise: Array, outputs: Array) -> Array:
    """diffusers' own scheduler stepped through guided outputs (n, B, 4, H, W), with injection."""
    plan = wide.plan
    assert plan is not None
    scheduler = diffusers_scheduler(wide.scheduler_config, plan.scheduler, wide.schedule.steps)
    start = torch.from_numpy(noise)
    sample = start
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        if plan.injection is not None and int(timestep) / 1000 < plan.injection.below:
            sample = sample + plan.injection.strength * start
        sample = scheduler.step(torch.from_numpy(output), timestep, sample).prev_sample
    latents: Array = sample.numpy()
    return latents
