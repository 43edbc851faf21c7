"""What `Pipeline` computes between the graphs, as ONNX models of a few nodes.

Each does in ONNX what a line of `sampling/sampler.py` or `bundle/chain.py` does in numpy, with the
plan's numbers as constants: an ensemble hands tensors on and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tiue_export.sampling.plan import Combination
from tiue_export.specs import Array, GraphSpec, TensorSpec

_OPSET = 19


@dataclass(frozen=True)
class Between:
    """One model: its tensors, its nodes, and its constants by name."""

    spec: GraphSpec
    nodes: tuple[NodeProto, ...]
    constants: dict[str, Array]

    def onnx_model(self) -> onnx.ModelProto:
        """The model as a file holds it."""
        graph = helper.make_graph(
            self.nodes,
            self.spec.name,
            [_value_info(tensor) for tensor in self.spec.inputs],
            [_value_info(tensor) for tensor in self.spec.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        opset = helper.make_opsetid("", _OPSET)
        made = helper.make_model(graph, opset_imports=[opset], producer_name="tiue-export")
        made.ir_version = 9  # what ONNX Runtime 1.18 reads
        onnx.checker.check_model(made)
        return made


def latent_scale(latents: TensorSpec, scaled: TensorSpec, scaling_factor: float) -> Between:
    """scaled = latents / scaling_factor, in float32 as `Pipeline.decode` computes it."""
    return Between(
        GraphSpec("latent_scale", (latents,), (scaled,)),
        (helper.make_node("Div", [latents.name, "scaling_factor"], [scaled.name]),),
        {"scaling_factor": np.array(scaling_factor, np.float32)},
    )


def text_rows(negative: TensorSpec, prompt: TensorSpec, text: TensorSpec) -> Between:
    """text (2B, L, D): the rows without the prompt first."""
    node = helper.make_node("Concat", [negative.name, prompt.name], [text.name], axis=0)
    return Between(GraphSpec("text_rows", (negative, prompt), (text,)), (node,), {})


def guided(outputs: TensorSpec, guidance: TensorSpec, mixed: TensorSpec) -> Between:
    """outputs (g*2*B, 4, H, W) and a scale for each of B -> (g*B, 4, H, W): `sampler.by_step`."""
    batch = guidance.shape[0]
    latent = outputs.shape[1:]
    return Between(
        GraphSpec("guidance", (outputs, guidance), (mixed,)),
        (
            helper.make_node("Reshape", [outputs.name, "halved"], ["halves"]),
            helper.make_node("Gather", ["halves", "first"], ["without"], axis=1),
            helper.make_node("Gather", ["halves", "second"], ["conditioned"], axis=1),
            helper.make_node("Sub", ["conditioned", "without"], ["difference"]),
            helper.make_node("Reshape", [guidance.name, "a_row_each"], ["scales"]),
            helper.make_node("Mul", ["scales", "difference"], ["scaled"]),
            helper.make_node("Add", ["without", "scaled"], ["by_step"]),
            helper.make_node("Reshape", ["by_step", "rows"], [mixed.name]),
        ),
        {
            "halved": np.array((-1, 2, batch, *latent), np.int64),
            "first": np.array(0, np.int64),
            "second": np.array(1, np.int64),
            "a_row_each": np.array((batch, 1, 1, 1), np.int64),
            "rows": np.array((-1, *latent), np.int64),
        },
    )


def combined(
    name: str,
    terms: Combination,
    noise: TensorSpec,
    outputs: Sequence[TensorSpec],
    total: TensorSpec,
) -> Between:
    """total (B, 4, H, W) = `sampler.combined`, in float64, of noise (N*B, 4, H, W) and outputs.

    Rows of both are B for each coefficient, in order; noises of later passes count for nothing.
    """
    batch, *latent = total.shape
    later = int(noise.shape[0]) // int(batch) - 1 - len(terms.fresh)
    weights = np.array((terms.noise, *terms.fresh, *(0.0,) * later, *terms.outputs), np.float64)
    names = [noise.name, *(tensor.name for tensor in outputs)]
    return Between(
        GraphSpec(name, (noise, *outputs), (total,)),
        (
            helper.make_node("Concat", names, ["rows"], axis=0),
            helper.make_node("Cast", ["rows"], ["exact"], to=TensorProto.DOUBLE),
            helper.make_node("Reshape", ["exact", "by_term"], ["terms"]),
            helper.make_node("Mul", ["terms", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "first_axis"], ["sum"], keepdims=0),
            helper.make_node("Cast", ["sum"], [total.name], to=TensorProto.FLOAT),
        ),
        {
            "by_term": np.array((len(weights), batch, *latent), np.int64),
            "weights": weights.reshape(-1, 1, 1, 1, 1),
            "first_axis": np.array([0], np.int64),
        },
    )


def pass_feeds(
    total: Between, copies: int, sample: TensorSpec, timesteps: Mapping[str, Array]
) -> Between:
    """What a pass is fed: a sum, for each of the text's copies, and its timesteps, constants."""
    (one,) = total.spec.outputs
    nodes = [helper.make_node("Concat", [one.name] * copies, [sample.name], axis=0)]
    outputs, constants = [sample], dict(total.constants)
    for name, values in timesteps.items():
        outputs.append(TensorSpec(name, "float32", values.shape))
        constants[f"{name}_values"] = values
        nodes.append(helper.make_node("Identity", [f"{name}_values"], [name]))
    spec = replace(total.spec, outputs=tuple(outputs))
    return Between(spec, (*total.nodes, *nodes), constants)


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, dtype, tensor.shape)
