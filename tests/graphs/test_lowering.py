"""What is replaced in a copy for export gives what it stands for, on the very same weights."""

from __future__ import annotations

import onnx
import pytest
import torch
from diffusers.models.activations import GEGLU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiue_export.graphs.build import build_graphs
from tiue_export.graphs.lowering import SplitGate, copied, in_precision
from tiue_export.graphs.options import ExportOptions
from tiue_export.specs import UNET_GRAPHS


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 33),
    st.integers(1, 70),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)
@torch.no_grad()
def test_a_split_gated_unit_gives_what_the_unit_gives(width, inner, tokens, bias, dtype):
    torch.manual_seed(width * inner)
    unit = GEGLU(width, inner, bias=bias).to(dtype)
    x = torch.randn(2, tokens, width, dtype=dtype)
    torch.testing.assert_close(SplitGate(unit)(x), unit(x))


def test_a_split_gated_unit_takes_no_memory_of_its_own():
    unit = nn.Sequential(GEGLU(4, 8))
    split = copied(unit)[0]
    assert isinstance(split, SplitGate)
    assert isinstance(unit[0], GEGLU)
    whole = unit[0].proj.weight.untyped_storage().data_ptr()
    for part in (split.value, split.gate):
        assert part.weight.untyped_storage().data_ptr() == whole
        assert part.weight.shape == (8, 4)
        assert not part.weight.requires_grad


def test_a_split_gated_unit_follows_the_precision_of_its_graph():
    split = in_precision(copied(nn.Sequential(GEGLU(4, 8))), torch.float16)
    assert {p.dtype for p in split.parameters()} == {torch.float16}
    island = in_precision(copied(nn.Sequential(GEGLU(4, 8))), torch.float16, frozenset({"0.gate"}))
    assert island[0].gate.weight.dtype == torch.float32
    assert island[0](torch.ones(1, 2, 4, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
def test_no_graph_holds_a_gated_unit_in_one_piece(tiny_student, hoist):
    graphs = build_graphs(tiny_student, ExportOptions(hoist=hoist), only=UNET_GRAPHS)
    for graph in graphs:
        kinds = [type(module) for module in graph.module.modules()]
        assert GEGLU not in kinds
        assert SplitGate in kinds


def test_no_exported_graph_has_a_split(tiny_bundle):
    for name in tiny_bundle.manifest.graphs:
        model = onnx.load(tiny_bundle.graph_path(name), load_external_data=False)
        assert "Split" not in {node.op_type for node in model.graph.node}
