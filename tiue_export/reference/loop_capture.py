"""The fp32 model run through its plan, pass by pass: what its graphs are held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tiue_export.bundle.manifest import ParityRecord
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.diffusers_loop import diffusers_loop, plan_scheduler
from tiue_export.proof.parity import loop_gate, loop_to_check, parity_record
from tiue_export.reference.half_audit import RangeRecorder, control_to_check
from tiue_export.sampling.plan import Combination, Plan, Timestep, single_pass
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
    return [*hops, *hops_of_diffusers(wide, noises, text, outputs, latents, inputs)]


def timesteps_to_check(plan: Plan) -> tuple[Timestep, ...]:
    """The first key step's timestep, the middle one and the last of all."""
    if not plan.open_rows:
        return plan.timesteps[:1]  # the decoder takes one step at a time
    listed = plan.timesteps
    return listed[0], listed[len(listed) // 2], listed[-1]


def _hops_of_rows(
    wide: Student, known: Mapping[str, Array], hoist: str, inputs: str
) -> list[ParityRecord]:
    """The first row against the UNet itself, all rows against its own up blocks."""
    sample, text = (torch.from_numpy(known[k]) for k in ("sample", "encoder_hidden_states"))
    timesteps = tuple(float(t) for t in known["timesteps"])
    naive = wide.by_plan(_rows_only(wide.plan, timesteps))
    with torch.no_grad():
        unsplit = wide.unet(sample, timesteps[0], text).sample.numpy()
        rows = naive.decode(naive.encode(sample, text), text).numpy()
    first = known["outputs"][: len(sample)]
    hop = "lowered" if hoist == "none" else "hoisted"
    return [
        parity_record("split", "first row / unsplit UNet", unsplit, first, "split", inputs),
        parity_record(hop, "outputs / naive decoder", rows, known["outputs"], "split", inputs),
    ]


def _hops_of_control(wide: Student, known: Mapping[str, Array], inputs: str) -> list[ParityRecord]:
    """The first row against diffusers' own ControlNet and UNet."""
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
    subject = "first row / unsplit UNet and ControlNet"
    return [parity_record("split", subject, whole.numpy(), first, "split", inputs)]


def _rows_only(plan: Plan, timesteps: tuple[Timestep, ...]) -> Plan:
    """For `Student.decode`, which takes its timesteps from the plan."""
    zeros = Combination(0.0, (0.0,) * len(timesteps))
    return single_pass(plan.method, plan.steps, timesteps, zeros, plan.prediction_type)


def hops_of_diffusers(
    wide: Student, noises: Array, text: Array, outputs: Array, latents: Array, inputs: str
) -> list[ParityRecord]:
    """The plan's sums, and of a few-step student its whole drawing, against diffusers' own loop.

    Noises (N, B, 4, H, W), text (B, L, D) or with guidance (2B, L, D), outputs (n, B, 4, H, W).
    """
    plan = wide.plan
    looped = looped_latents(wide, noises, outputs)
    if looped is None:
        return []
    subject = f"latents / {plan.scheduler} loop"
    hops = [parity_record("closed form", subject, looped, latents, "split", inputs)]
    if plan.recipe:
        drawn = unsplit_latents(wide, noises, text)
        shared = any(one.rows > 1 for one in plan.passes)
        # What sharing the encoder costs is a choice: it is told, not judged.
        hop, gate = ("shared encoder", None) if shared else ("diffusers", loop_gate(plan))
        subject = f"latents / its {plan.scheduler} loop, unsplit UNet"
        hops.append(parity_record(hop, subject, drawn, latents, gate, inputs))
    return hops


def looped_latents(wide: Student, noises: Array, outputs: Array) -> Array | None:
    """diffusers' own scheduler stepped through outputs (n, B, 4, H, W); None where it has none."""
    scheduler = plan_scheduler(wide.scheduler_config, wide.plan)
    if scheduler is None:
        return None
    given = torch.from_numpy(outputs)
    latents: Array = diffusers_loop(scheduler, wide.plan, noises, lambda x, t, k: given[k]).numpy()
    return latents


@torch.no_grad()
def unsplit_latents(wide: Student, noises: Array, text: Array) -> Array:
    """A student drawn as diffusers' pipelines do: its whole UNet at every step."""
    plan, embedding = wide.plan, torch.from_numpy(text)

    def network(sample: Tensor, timestep: Tensor, number: int) -> Tensor:
        rows = torch.cat([sample] * plan.copies)
        output: Tensor = wide.unet(rows, timestep, embedding).sample
        if plan.guidance is None:
            return output
        without, conditioned = output.chunk(2)
        return without + plan.guidance * (conditioned - without)

    scheduler = plan_scheduler(wide.scheduler_config, plan)
    latents: Array = diffusers_loop(scheduler, plan, noises, network).numpy()
    return latents
