"""What an export will write and need, before anything is written (`--dry-run`)."""

from __future__ import annotations

from dataclasses import dataclass

from tiue_export.graphs.build import build_graphs, exported_plan
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.parity import CHECKED_ROWS
from tiue_export.sampling.plan import Timestep
from tiue_export.student.model import Student

_LIBRARIES_BYTES = 1_000_000_000


@dataclass(frozen=True)
class GraphPlan:
    """What exporting one graph will write."""

    name: str
    inputs: int
    outputs: int
    weight_bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """What `--dry-run` prints. Memory is an estimate; see `plan_export`."""

    graphs: tuple[GraphPlan, ...]
    latent_shape: tuple[int, ...]
    recipe: str
    steps: int
    timesteps: tuple[Timestep, ...]
    size_bytes: int
    memory_bytes: int
    # The steps that run the encoder, with Faster Diffusion.
    key_steps: tuple[int, ...] = ()


def plan_export(student: Student, options: ExportOptions) -> ExportPlan:
    """What an export would write and need, without writing anything."""
    graphs = build_graphs(student, options)
    size_bytes = sum(graph.weight_bytes for graph in graphs)
    loaded = sum(p.numel() * p.element_size() for p in student.parameters())
    plan = exported_plan(student, options)
    memory_bytes = _LIBRARIES_BYTES + loaded + _verification_bytes(student, options)
    return ExportPlan(
        tuple(
            GraphPlan(g.spec.name, len(g.spec.inputs), len(g.spec.outputs), g.weight_bytes)
            for g in graphs
        ),
        shapes_of(student, options).latents,
        plan.recipe,
        plan.steps,
        plan.timesteps,
        size_bytes,
        memory_bytes,
        () if plan.one_pass else plan.key_steps,
    )


def _verification_bytes(student: Student, options: ExportOptions) -> int:
    """What checking the decoder needs on top of the checkpoint: it decides the peak.

    Fitted to SD 2.1-base at 512 px: ONNX Runtime's CPU provider holds a half graph's weights in
    float32 too, and two and a half times the attention scores of the widest layer.
    """
    batch, _, height, width = shapes_of(student, options).latents
    plan = exported_plan(student, options)
    rows = plan.rows * batch if plan.one_pass else max(CHECKED_ROWS, plan.copies * batch)
    decoder = int(sum(p.numel() for p in student.unet.up_blocks.parameters()))
    attentions = [m for m in student.unet.up_blocks.modules() if hasattr(m, "heads")]
    heads = min((int(attention.heads) for attention in attentions), default=0)
    scores: int = 4 * rows * heads * (height * width) ** 2
    return decoder * (6 if options.precision == "fp16" else 4) + 5 * scores // 2
