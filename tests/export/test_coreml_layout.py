"""Every form of a graph for Core ML computes what the graph computes, from the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiue_export.errors import UsageError
from tiue_export.export.coreml import layout as coreml_layout
from tiue_export.export.coreml.layout import attend_by_head, attend_channels, with_layout
from tiue_export.export.coreml.profiles import ATTENTIONS, DECODER_BATCHES, LINEARS
from tiue_export.graphs.build import build_graphs
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.specs import UNET_GRAPHS

EXACT_DB = 115.0
FORMS = [(a, "conv", b) for a in ATTENTIONS for b in (1, 2)] + [("split-chunked", "linear", 2)]


@pytest.fixture(scope="module")
def truth(tiny_student):
    """Per (hoisting, batch): inputs and outputs of both UNet graphs as they are."""
    kept = {}

    def computed(hoist: str, batch: int):
        if (hoist, batch) not in kept:
            options = ExportOptions(batch=batch, hoist=hoist)
            torch.manual_seed(0)
            graphs = build_graphs(tiny_student, options, only=UNET_GRAPHS)
            inputs = [[torch.randn_like(x) for x in graph.example] for graph in graphs]
            with torch.no_grad():
                outputs = [
                    graph.module(*given) for graph, given in zip(graphs, inputs, strict=True)
                ]
            kept[hoist, batch] = options, inputs, outputs
        return kept[hoist, batch]

    return computed


@pytest.mark.parametrize(("hoist", "batch"), [("decoder", 1), ("decoder", 2), ("encoder", 1)])
@pytest.mark.parametrize(("attention", "linear", "decoder_batch"), FORMS)
def test_each_form_gives_the_same_numbers(
    tiny_student, truth, monkeypatch, hoist, batch, attention, linear, decoder_batch
):
    monkeypatch.setattr(coreml_layout, "CHUNK", 24)  # 64 tokens: two pieces and a rest
    options, inputs, outputs = truth(hoist, batch)
    graphs = build_graphs(tiny_student, options, only=UNET_GRAPHS)
    for graph, given, expected in zip(graphs, inputs, outputs, strict=True):
        module = with_layout(graph, attention, linear, decoder_batch)
        with torch.no_grad():
            found = module(*given)
        for ours, theirs in zip(found, expected, strict=True):
            assert psnr_db(theirs.numpy(), ours.numpy()) > EXACT_DB


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("decoder_batch", DECODER_BATCHES)
def test_groups_of_rows_share_their_weights(tiny_student, linear, decoder_batch):
    def weights(batch: int) -> int:
        graph = build_graphs(tiny_student, ExportOptions(), only=UNET_GRAPHS)[1]
        module = with_layout(graph, "sdpa", linear, batch)
        return sum(parameter.numel() for parameter in module.parameters())

    assert weights(decoder_batch) == weights(4)


def test_the_student_is_left_as_it_was(tiny_student):
    before = {name: value.clone() for name, value in tiny_student.state_dict().items()}
    for graph in build_graphs(tiny_student, ExportOptions(), only=UNET_GRAPHS):
        with_layout(graph, "split", "conv", 1)
    after = tiny_student.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_rows_of_a_naive_decoder_cannot_be_grouped(tiny_student):
    graph = build_graphs(tiny_student, ExportOptions(hoist="none"), only=UNET_GRAPHS)[1]
    with pytest.raises(UsageError, match="--decoder-batch 2 cuts the decoder's 4 rows in groups"):
        with_layout(graph, "sdpa", "linear", 2)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("keys", [5, 700])
def test_attention_over_channels_is_attention(attention, keys):
    torch.manual_seed(1)
    heads, width, queries = 3, 4, 600
    q, k, v = (torch.randn(2, heads, n, width) for n in (queries, keys, keys))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    q4, k4, v4 = (x.transpose(2, 3).reshape(2, heads * width, 1, -1) for x in (q, k, v))
    found = attend_channels(q4, k4, v4, heads, attention)
    by_head = found.reshape(2, heads, width, queries).transpose(2, 3)
    np.testing.assert_allclose(by_head, expected, atol=2e-6)
    np.testing.assert_allclose(attend_by_head(q, k, v, 512), expected, atol=2e-6)
