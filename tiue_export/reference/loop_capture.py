"""The fp32 model run through its plan, pass by pass: what its graphs are held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tiue_export.bundle.manifest import ParityRecord
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.scheduler import diffusers_scheduler
from tiue_export.proof.parity import loop_to_check, parity_record
from tiue_export.reference.half_audit import RangeRecorder, control_to_check
from tiue_export.sampling.key_step_plan import SCHEDULERS
from tiue_export.sampling.plan import Combination, Plan, single_pass
from tiue_export.sampling.sampler import OnStep, added, combined, encoder_feeds, sampled_outputs
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

    `known` brings the noises as "sample" (N, B, 4, H, W), and the text, with guidance both halves.
    Returns the hops on torch's side: rows against the unsplit UNet and the naive decoder, and the
    plan's sums against diffusers' own scheduler.
    """
    plan, noises = wide.plan, known.pop("sample")
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
    outputs = sampled_outputs(small, run, noises, text, on_step=on_step, control=control)
    latents = combined(plan.latents, noises, outputs)
    # One group is kept as the graphs' own check: the key step and two steps far from it.
    known |= encoder_feeds(plan.passes[0], noises[0], text)
    known["timesteps"] = np.array(timesteps_to_check(plan), np.float32)
    features = run(UNET_ENCODER, known)
    if control is not None:
        features = added(features, run(CONTROLNET, known))
    pool = {**known, **features}
    known["outputs"] = run(UNET_DECODER, pool)["outputs"]
    known |= {"noise": noises[0], "latents": latents}
    if plan.noises > 1:
        known["fresh_noise"] = noises[1:]
    if control is None:
        hops = _hops_of_rows(wide, known, options.hoist, inputs)
    else:
        hops = _hops_of_control(wide, known, inputs)
    # A sampler that is not among these is held against its own library where its plan is derived.
    if plan.scheduler in SCHEDULERS:
        looped, subject = scheduler_loop(wide, noises, outputs), f"latents / {plan.scheduler} loop"
        hops.append(parity_record("closed form", subject, looped, latents, "split", inputs))
    return hops


def timesteps_to_check(plan: Plan) -> tuple[int, ...]:
    """The first key step's timestep, the middle one and the last of all."""
    if not plan.open_rows:
        return plan.timesteps[:1]  # the decoder takes one step at a time
    listed = plan.timesteps
    return listed[0], listed[len(listed) // 2], listed[-1]


def _hops_of_rows(
    wide: Student, known: Mapping[str, Array], hoist: str, inputs: str
) -> list[ParityRecord]:
    """The key step's rows against the UNet itself, all rows against its own up blocks."""
    sample, text = (torch.from_numpy(known[k]) for k in ("sample", "encoder_hidden_states"))
    timesteps = tuple(int(t) for t in known["timesteps"])
    naive = Student(
        wide.unet,
        _rows_only(wide.plan, timesteps),
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


def _rows_only(plan: Plan, timesteps: tuple[int, ...]) -> Plan:
    """For `Student.decode`, which takes its timesteps from the plan."""
    zeros = Combination(0.0, (0.0,) * len(timesteps))
    return single_pass(plan.method, plan.steps, timesteps, zeros, plan.prediction_type)


def scheduler_loop(wide: Student, noises: Array, outputs: Array) -> Array:
    """diffusers' own scheduler stepped through guided outputs (n, B, 4, H, W), with injection."""
    plan = wide.plan
    scheduler = diffusers_scheduler(wide.scheduler_config, plan.scheduler, plan.steps)
    start = torch.from_numpy(noises[0])
    sample = start
    for timestep, output in zip(scheduler.timesteps, outputs, strict=True):
        if plan.injection is not None and int(timestep) / 1000 < plan.injection.below:
            sample = sample + plan.injection.strength * start
        sample = scheduler.step(torch.from_numpy(output), timestep, sample).prev_sample
    latents: Array = sample.numpy()
    return latents
