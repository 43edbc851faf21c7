"""What sharing features costs a model, measured: each step's features on every later decoder.

Along plain sampling, the features of step s are given to the decoders of s, s + 1, ... . What the
latents would be off by if those were one group is sum_i E_i (output by shared - by own features),
with E_i the weight of output i in the final latents: to first order, as later steps do not react.
The decoder works on whole groups anyway, so one step costs an encoder run and one decoder batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from tiue_export.bundle.chain import TOKENS
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.graphs.build import Graph, build_graphs, gaussian_text, meta_twin, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.proof.parity import CHECKED_ROWS, PROMPTS, loop_to_check
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import key_steps_from
from tiue_export.sampling.key_steps import Choice, choose_key_steps, encoder_runs_within
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.sampler import (
    OnStep,
    by_step,
    combined,
    encoder_feeds,
    guidance_rows,
    pieces,
    sample,
)
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    Array,
    Feeds,
)
from tiue_export.student.model import Student

DEFAULT_REACH = 20


@dataclass(frozen=True)
class TorchModel:
    """An undistilled model run by torch in float32, one picture at a time."""

    teacher: Student
    graphs: Mapping[str, Graph]
    shape: tuple[int, ...]
    encoder_share: float

    def run(self, name: str, pool: Feeds) -> dict[str, Array]:
        """One graph on its inputs out of `pool`."""
        return run_graph(self.graphs[name], pool)[1]

    def text(self, prompt: str, negative: str = "") -> Array:
        """(2, L, D), the negative prompt first; Gaussian without a text encoder."""
        if TEXT_ENCODER not in self.graphs or self.teacher.tokenizer_folder is None:
            _, length, width = shapes_of(self.teacher).text
            return gaussian_text((2, length, width), len(prompt))
        tokenizer = tokenizer_of(self.teacher.tokenizer_folder, shapes_of(self.teacher).tokens)
        runs = [
            self.run(TEXT_ENCODER, {TOKENS: tokenizer([words])}) for words in (negative, prompt)
        ]
        return np.concatenate([rows for outputs in runs for rows in outputs.values()])

    def noise(self, seed: int) -> Array:
        """(1, 4, H, W)."""
        return noise_from_seed(seed, self.shape)

    def latents(self, plan: Plan, seed: int, text: Array, guidance: float) -> Array:
        """One picture by a plan, (1, 4, H, W)."""
        small = loop_to_check(plan, len(text))
        return sample(small, self.run, self.noise(seed)[None], text, guidance)


def torch_model(
    teacher: Student, height: int | None = None, width: int | None = None
) -> TorchModel:
    """Build a teacher's graphs for torch; `teacher.plan` decides nothing here."""
    options = ExportOptions(height=height, width=width)
    names = (TEXT_ENCODER, *UNET_GRAPHS)
    graphs = {graph.spec.name: graph for graph in build_graphs(teacher, options, only=names)}
    flops = [unet_flops(graphs[name]) for name in UNET_GRAPHS]
    share = flops[0] / sum(flops)
    return TorchModel(teacher, graphs, shapes_of(teacher, options).latents, share)


def unet_flops(graph: Graph) -> float:
    """Operations of one run of a graph for one step, counted without computing anything."""
    inputs = [tensor.to("meta") for tensor in graph.example]
    names = [spec.name for spec in graph.spec.inputs]
    if "timesteps" in names:
        place = names.index("timesteps")
        inputs[place] = inputs[place][:1]
    twin = meta_twin(graph.module)
    with FlopCounterMode(display=False) as counter:
        twin(*inputs)
    return float(counter.get_total_flops())


def group_losses(
    model: TorchModel,
    plan: Plan,
    seed: int,
    text: Array,
    guidance: float,
    reach: int = DEFAULT_REACH,
    on_step: OnStep = lambda done, total: None,
) -> Array:
    """Losses (n + 1, n + 1) of every group up to `reach` steps long, as `choose_key_steps` wants.

    RMS deviation of the final latents over their own RMS; infinite where it was not measured.
    `plan` must have every step as a key step.
    """
    noise, scales = model.noise(seed), guidance_rows(guidance, 1)
    noises = noise[None]
    listed, weights = plan.timesteps, plan.latents.outputs
    count = len(listed)
    losses = np.full((count + 1, count + 1), np.inf)
    outputs = np.zeros((count, *noise.shape), np.float32)
    ahead: dict[int, Array] = {}  # of step s: its outputs at s + 1, s + 2, ...
    drift: dict[int, Array] = {}  # of step s: weighted sum of what they were off by
    for i, one in enumerate(plan.passes):
        start = combined(one.input, noises, outputs)
        features = model.run(UNET_ENCODER, encoder_feeds(one, start, text))
        whole = replace(one, timesteps=listed[i : i + reach])
        rows = []
        for timesteps in pieces(whole, CHECKED_ROWS, len(text)):
            feeds = {**features, "encoder_hidden_states": text, "timesteps": timesteps}
            found = model.run(UNET_DECODER, feeds)["outputs"]
            rows.append(by_step(found, len(timesteps), scales))
        ahead[i] = np.concatenate(rows)  # (g, 1, 4, H, W)
        outputs[i], drift[i] = ahead[i][0], np.zeros(noise.shape)
        losses[i, i + 1] = 0.0
        for s in range(max(0, i - reach + 1), i):
            drift[s] += weights[i] * (ahead[s][i - s].astype(np.float64) - outputs[i])
            losses[s, i + 1] = _rms(drift[s])
        for finished in [s for s in ahead if s <= i - reach + 1]:
            del ahead[finished], drift[finished]
        on_step(i + 1, count)
    latents = combined(plan.latents, noises, outputs)
    return losses / _rms(latents)


def _rms(array: Array) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def deviation(reference: Array, latents: Array) -> float:
    """RMS difference of latents over the reference's RMS."""
    return _rms(latents - reference) / _rms(reference)


def every_step(teacher: Student, options: FasterOptions) -> Plan:
    """Plain sampling as a plan: all steps key, nothing injected."""
    plain = FasterOptions(
        scheduler=options.scheduler,
        steps=options.steps,
        key_steps="uniform:1",
        inject="off",
        guidance=options.guidance,
    )
    return plan_from_config(teacher.scheduler_config, plain)


def auto_key_steps(
    teacher: Student,
    options: FasterOptions,
    budget: float | None,
    prompts: Sequence[str] = PROMPTS,
    on_step: OnStep = lambda done, total: None,
    size_px: tuple[int | None, int | None] = (None, None),
) -> Choice:
    """Measure on `prompts` (seeds 0, 1, ...) and choose within a share of the operations.

    `size_px` is (height, width); None is the model's own. Without a budget there are as many
    encoder runs as in the published list. Raises `UsageError` for a budget that no plan can meet.
    """
    plan = every_step(teacher, options)
    count = plan.rows
    model = torch_model(teacher, *size_px)
    if budget is None:
        runs = len(key_steps_from("nonuniform", count))
    else:
        runs = encoder_runs_within(budget, count, model.encoder_share)
    total = np.zeros((count + 1, count + 1))
    for number, prompt in enumerate(prompts):

        def told(done: int, of: int, before: int = number) -> None:
            on_step(before * of + done, len(prompts) * of)

        text = model.text(prompt)
        total += group_losses(model, plan, number, text, options.guidance, count, told)
    return choose_key_steps(total / len(prompts), runs)


def auto_options(
    teacher: Student,
    options: FasterOptions,
    budget: float | None,
    on_step: OnStep = lambda done, total: None,
    size_px: tuple[int | None, int | None] = (None, None),
) -> FasterOptions:
    """The options with key steps chosen by `auto_key_steps`, and how, for the manifest."""
    choice = auto_key_steps(teacher, options, budget, PROMPTS, on_step, size_px)
    within = "as many as published" if budget is None else f"budget {budget:g}"
    how = f"auto, {within}, {len(PROMPTS)} prompts, loss {choice.loss:.4f}"
    return replace(options, key_steps=choice.key_steps, chosen_by=how)
