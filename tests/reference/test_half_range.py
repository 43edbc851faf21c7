"""The overflow audit finds what half precision cannot carry, and the islands carry it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules import module as torch_module

from tiue_export import ExportOptions, export_onnx, load_student
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import BundleError, ParityError, RuntimeFailure, UsageError
from tiue_export.export.onnx.write import onnx_from_graph
from tiue_export.graphs.build import Graph, build_graphs, run_graph
from tiue_export.proof.half_range import (
    AUDIT_FILE,
    HALF_MAX,
    HOT_ABOVE,
    Float32Parts,
    GraphRanges,
    OpRange,
    OverflowAudit,
    float32_parts,
    island_of,
    lies_in,
    load_audit,
    node_path,
)
from tiue_export.proof.parity import PROMPTS
from tiue_export.reference import half_audit as audit_module
from tiue_export.reference.capture import Capture, capture, half_attention, measure_half_arithmetic
from tiue_export.reference.half_audit import (
    RangeRecorder,
    audit_student,
    largest_product,
    largest_value,
    steps_in_half,
)
from tiue_export.registry.backends import open_runtime
from tiue_export.specs import RuntimeOptions
from tiue_export.student.model import Student

UNET = ("unet_encoder", "unet_decoder")
FEW = settings(max_examples=40, deadline=None)


# Students whose values leave half precision's range, without leaving anything else.


@torch.no_grad()
def with_hot_product(student: Student, block: str) -> Student:
    """A feed-forward product 10,000 times as large, and as much smaller weights after it."""
    student = copy.deepcopy(student)
    layers: Any = student.unet.get_submodule(f"{block}.ff").net
    layers[0].proj.weight *= 100
    layers[0].proj.bias *= 100
    layers[2].weight /= 1e4
    return student


@torch.no_grad()
def with_hot_scores(student: Student, block: str) -> Student:
    """Attention scores with a large constant added to each row, which softmax does not feel."""
    student = copy.deepcopy(student)
    layer: Any = student.unet.get_submodule(block)
    layer.norm1.weight[0], layer.norm1.bias[0] = 0, 1
    layer.attn1.to_q.weight[:, 0], layer.attn1.to_k.weight[:, 0] = 4, 6000
    return student


@torch.no_grad()
def with_hot_stream(student: Student, convolution: str) -> Student:
    """A residual stream 100,000 times as large from one convolution to the next norms."""
    student = copy.deepcopy(student)
    layer: Any = student.get_submodule(convolution)
    layer.weight *= 1e5
    return student


@dataclass(frozen=True)
class Case:
    """A change to the student, and what the audit must make of it."""

    change: Callable[[Student], Student]
    hoist: str
    graph: str
    cause: tuple[str, str]
    island: str


DOWN, UP = (f"{side}_blocks.1.attentions.0.transformer_blocks.0" for side in ("down", "up"))
CASES = {
    "product in the encoder": Case(
        lambda s: with_hot_product(s, DOWN),
        "decoder",
        "unet_encoder",
        (f"unet.{DOWN}.ff.net.0", "mul"),
        f"unet.{DOWN}.ff",
    ),
    "product in the hoisted decoder": Case(
        lambda s: with_hot_product(s, UP),
        "decoder",
        "unet_decoder",
        (f"rows.{UP}.ff.net.0", "mul"),
        f"rows.{UP}.ff",
    ),
    "product in the naive decoder": Case(
        lambda s: with_hot_product(s, UP),
        "none",
        "unet_decoder",
        (f"unet.{UP}.ff.net.0", "mul"),
        f"unet.{UP}.ff",
    ),
    "attention scores": Case(
        lambda s: with_hot_scores(s, DOWN),
        "encoder",
        "unet_encoder",
        (f"encoder.unet.{DOWN}.attn1", "attention_scores"),
        f"encoder.unet.{DOWN}.attn1",
    ),
    "residual stream of the hoisted decoder": Case(
        lambda s: with_hot_stream(s, "unet.up_blocks.1.upsamplers.0.conv"),
        "decoder",
        "unet_decoder",
        ("rows.up_blocks.1.upsamplers.0.conv", "conv2d"),
        "rows",
    ),
    "residual stream of the naive decoder": Case(
        lambda s: with_hot_stream(s, "unet.up_blocks.1.upsamplers.0.conv"),
        "none",
        "unet_decoder",
        ("unet.up_blocks.1.upsamplers.0.conv", "conv2d"),
        "",
    ),
    "residual stream of the VAE": Case(
        lambda s: with_hot_stream(s, "vae.decoder.mid_block.resnets.0.conv2"),
        "decoder",
        "vae_decoder",
        ("vae.decoder.mid_block.resnets.0.conv2", "conv2d"),
        "vae.decoder",
    ),
}


def audited(
    student: Student, options: ExportOptions
) -> tuple[Capture, dict[str, GraphRanges], Float32Parts]:
    """The fp32 run with a recorder, as an export makes it; on a made-up text embedding."""
    recorder = RangeRecorder(student, options)
    captured = capture(student, options, None, recorder)
    ranges = {name: recorder.ranges(name) for name in recorder.watched}
    return captured, ranges, float32_parts(ranges.values())


def build(student: Student, options: ExportOptions, name: str) -> Graph:
    return next(g for g in build_graphs(student, options) if g.spec.name == name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_hot_value_is_found_and_its_island_carries_what_half_precision_cannot(case, tiny_student):
    student = case.change(tiny_student)
    options = ExportOptions(precision="fp16", hoist=case.hoist)
    captured, ranges, parts = audited(student, options)
    hot = [(found.module, found.op) for found in ranges[case.graph].ranges if found.hot]
    assert case.cause in hot
    assert all(lies_in(module, [case.island]) for module, _ in hot)
    assert [island.module for island in ranges[case.graph].islands()] == [case.island]
    assert parts == Float32Parts({case.graph: frozenset({case.island})})

    feeds, expected = captured.graph_io[case.graph]
    bare = build(student, options, case.graph)
    with pytest.raises(ParityError, match=f"{case.graph} overflows half precision") as caught:
        measure_half_arithmetic(bare, feeds, expected, "")
    assert "An audit (on unless --no-audit) keeps such values in float32" in str(caught.value)

    kept = build(student, replace(options, float32=parts), case.graph)
    record = measure_half_arithmetic(kept, feeds, expected, "")
    assert record.gate == (100 if case.island == "" else 60)
    assert record.value > 60
    assert kept.precision == ("fp32" if case.island == "" else "fp16")
    assert kept.spec == bare.spec


def test_only_the_island_is_in_float32(tiny_student):
    parts = Float32Parts({"unet_decoder": frozenset({f"rows.{UP}.ff"})})
    options = ExportOptions(precision="fp16", float32=parts)
    graph = build(tiny_student, options, "unet_decoder")
    for path, module in graph.module.named_modules():
        norm = isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))
        float32 = norm or lies_in(path, [f"rows.{UP}.ff"]) or path == "rows.combine"
        kinds = {t.dtype for t in [*module.parameters(False), *module.buffers(False)]}
        assert kinds <= {torch.float32 if float32 else torch.float16}, path
    own = tiny_student.unet.get_submodule(UP).ff.net[0].proj.weight
    unit = graph.module.get_submodule(f"rows.{UP}.ff").net[0]
    assert torch.equal(torch.cat([unit.value.weight, unit.gate.weight]), own)
    for kept in (unit.value.weight, unit.gate.weight):
        assert kept.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()


@pytest.mark.slow
def test_a_skip_that_half_cannot_carry_travels_in_float32(tiny_student, tmp_path):
    student = with_hot_stream(tiny_student, "unet.conv_in")
    options = ExportOptions(precision="fp16", dynamic_batch=True)
    captured, _, parts = audited(student, options)
    assert {graph: set(modules) for graph, modules in parts.modules.items()} == {
        "unet_encoder": {""},
        "unet_decoder": {""},
    }
    assert {"down_res_0", "down_res_1"} <= parts.tensors
    for graph in build_graphs(student, replace(options, float32=parts), UNET):
        assert graph.precision == "fp32"
        for spec in (*graph.spec.inputs, *graph.spec.outputs):
            half = spec.name not in {*parts.tensors, "sample", "latents"}
            assert spec.dtype == ("float16" if half else "float32"), spec.name
        feeds, expected = captured.graph_io[graph.spec.name]
        assert measure_half_arithmetic(graph, feeds, expected, "").value > 60
        if graph.spec.name == "unet_encoder":
            onnx_from_graph(graph, tmp_path)  # checks the file against the spec


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
def test_a_whole_graph_in_float32_keeps_its_neighbours_contracts(hoist, tiny_student):
    options = ExportOptions(precision="fp16", hoist=hoist)
    captured, _, _ = audited(tiny_student, options)
    plain = {graph.spec.name: graph.spec for graph in build_graphs(tiny_student, options, UNET)}
    for whole in UNET:
        parts = Float32Parts({whole: frozenset({""})})
        for graph in build_graphs(tiny_student, replace(options, float32=parts), UNET):
            assert graph.precision == ("fp32" if graph.spec.name == whole else "fp16")
            assert graph.spec == plain[graph.spec.name]
            feeds, expected = captured.graph_io[graph.spec.name]
            assert measure_half_arithmetic(graph, feeds, expected, "").value > 60


def test_scores_that_the_model_upcasts_are_no_risk(tiny_student):
    student = with_hot_scores(tiny_student, DOWN)
    student.unet.register_to_config(upcast_attention=True)
    _, ranges, parts = audited(student, ExportOptions(precision="fp16"))
    scores = [r for r in ranges["unet_encoder"].ranges if r.op == "attention_scores"]
    assert max(found.max_abs for found in scores) > HALF_MAX
    assert not any(found.in_half for found in scores)
    assert parts == Float32Parts()


def test_without_a_hot_value_the_bundle_is_the_same_as_without_an_audit(micro_folder, tmp_path):
    student = load_student(micro_folder)
    options = ExportOptions(precision="fp16")
    plain = export_onnx(student, tmp_path / "plain", options, audit=False)
    audited = export_onnx(student, tmp_path / "audited", options)
    assert load_audit(plain) is None
    for name, before in plain.manifest.graphs.items():
        graph = audited.manifest.graphs[name]
        assert (graph.files, graph.inputs) == (before.files, before.inputs)
        assert (graph.float32_modules, before.max_abs_in_half) == ((), None)
        assert 1 < graph.max_abs_in_half < HOT_ABOVE


def test_an_export_audits_applies_islands_and_keeps_the_findings(micro_folder, tmp_path):
    student = load_student(micro_folder)
    down = DOWN.replace("blocks.1", "blocks.0")
    student = with_hot_product(student, down)
    options = ExportOptions(precision="fp16")
    with pytest.raises(ParityError, match="unet_encoder overflows half precision"):
        export_onnx(student, tmp_path / "bundle", options, audit=False)
    assert list(tmp_path.iterdir()) == []
    bundle = export_onnx(student, tmp_path / "bundle", options, audit_prompts=PROMPTS)
    manifest = bundle.manifest
    assert all(record.passed for record in manifest.parity)
    encoder = manifest.graphs["unet_encoder"]
    assert (encoder.precision, encoder.float32_modules) == ("fp16", (f"{down}.ff",))
    assert encoder.max_abs_in_half < HOT_ABOVE
    assert AUDIT_FILE in manifest.files
    found = load_audit(bundle)
    assert found.inputs.endswith("2 more prompt(s)")
    assert [graph.graph for graph in found.graphs] == list(UNET)
    (island,) = found.graphs[0].islands
    assert (island.module, island.cause.module) == (f"{down}.ff", f"{down}.ff.net.0")
    assert found.graphs[0].largest[0] == island.cause
    assert found.graphs[1].islands == ()

    model = onnx.load(bundle.graph_path("unet_encoder"), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Conv", "Gemm")]
    for node in products:
        inside = lies_in(node.name.rpartition("/")[0], encoder.float32_modules)
        expected = onnx.TensorProto.FLOAT if inside else onnx.TensorProto.FLOAT16
        assert kinds[node.output[0]] == expected, node.name
    # The table's paths are the nodes' paths.
    paths = {node.name.rpartition("/")[0] for node in model.graph.node}
    heavy = {r.module for r in found.graphs[0].largest if r.op in ("linear", "conv2d", "mul")}
    assert heavy
    assert heavy <= paths


@pytest.mark.slow
def test_the_vae_precision_is_the_audits_or_the_users(tiny_student, micro_folder, tmp_path):
    student = load_student(micro_folder)
    student.vae = tiny_student.vae
    student = with_hot_stream(student, "vae.decoder.mid_block.resnets.0.conv2")
    options = ExportOptions(precision="fp16", vae_precision="bf16")
    bundle = export_onnx(student, tmp_path / "bundle", options)
    assert bundle.manifest.graphs["vae_decoder"].precision == "bf16"
    assert bundle.manifest.graphs["unet_decoder"].precision == "fp16"
    assert [graph.graph for graph in load_audit(bundle).graphs] == list(UNET)
    (record,) = (r for r in bundle.manifest.parity if r.subject == "vae_decoder")
    assert (record.hop, record.gate, record.passed) == ("bf16 arithmetic", 40, True)
    runtime = open_runtime("ort", bundle, RuntimeOptions())
    with pytest.raises(RuntimeFailure, match="vae_decoder is in bf16, which ONNX Runtime does not"):
        runtime.run("vae_decoder", {"latent_sample": np.zeros((1, 4, 8, 8), np.float32)})
    assert not any(record.subject == "picture" for record in bundle.manifest.parity)
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        chosen = replace(options, vae_precision=precision)
        graph = build(student, chosen, "vae_decoder")
        assert graph.precision == precision
        assert graph.module.vae.decoder.conv_in.weight.dtype == dtype
        assert [spec.dtype for spec in (*graph.spec.inputs, *graph.spec.outputs)] == ["float32"] * 2


# What is measured.


def hooked(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    """max|output| of every module that is called, by plain hooks on this copy of the graph."""
    seen: dict[str, float] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            leaves = torch.utils._pytree.tree_leaves(output)
            floats = [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]
            for tensor in floats:
                seen[path] = max(seen.get(path, 0.0), float(tensor.abs().max()))

        return hook

    for path, module in graph.module.named_modules():
        module.register_forward_hook(keep(path))
    run_graph(graph, feeds)
    return seen


@pytest.mark.parametrize("hoist", ["decoder", "none"])
def test_largest_values_are_what_hooks_see(hoist, tiny_student):
    options = ExportOptions(hoist=hoist)
    captured, ranges, _ = audited(tiny_student, options)
    for graph in build_graphs(tiny_student, options, (*UNET, "vae_decoder")):
        found = ranges[graph.spec.name]
        seen = hooked(graph, dict(captured.graph_io[graph.spec.name][0]))
        assert seen.keys() <= found.outputs.keys()
        shared = {path for path in found.outputs if path.endswith("act")}
        for path in seen.keys() - shared:
            assert found.outputs[path] == seen[path], path
        values = {(r.module, r.op): r.max_abs for r in found.ranges}
        kinds = {torch.nn.Conv2d: "conv2d", torch.nn.Linear: "linear", torch.nn.SiLU: "silu"}
        checked = 0
        for path, module in graph.module.named_modules():
            if type(module) in kinds and path in seen and path not in shared:
                assert values[path, kinds[type(module)]] == seen[path], path
                checked += 1
        assert checked > 10


def test_attention_scores_are_those_before_softmax(tiny_student):
    captured, ranges, _ = audited(tiny_student, ExportOptions())
    graph = build(tiny_student, ExportOptions(), "unet_encoder")
    attention = graph.module.get_submodule(f"unet.{DOWN}.attn1")
    parts: list[torch.Tensor] = []
    for projection in (attention.to_q, attention.to_k):
        projection.register_forward_hook(lambda module, args, output: parts.append(output))
    run_graph(graph, captured.graph_io["unet_encoder"][0])
    query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in parts)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    (found,) = (
        r.max_abs
        for r in ranges["unet_encoder"].ranges
        if (r.module, r.op) == (f"unet.{DOWN}.attn1", "attention_scores")
    )
    assert found == pytest.approx(float(scores.abs().max()), rel=1e-5)


def test_more_prompts_only_raise_the_ranges(tiny_student):
    tokenizer = tokenizer_of(tiny_student.tokenizer_folder, 77)
    options = ExportOptions(batch=2)
    few = {g.graph: g for g in audit_student(tiny_student, options, tokenizer, PROMPTS)}
    more = {g.graph: g for g in audit_student(tiny_student, options, tokenizer, [*PROMPTS, "a"])}
    assert list(few) == list(more) == ["text_encoder", *UNET, "vae_decoder"]
    for name, graph in few.items():
        wider = {(r.module, r.op): r.max_abs for r in more[name].ranges}
        assert {(r.module, r.op) for r in graph.ranges} == wider.keys()
        assert all(r.max_abs <= wider[r.module, r.op] * (1 + 1e-5) for r in graph.ranges)


def test_norms_and_the_weighted_sum_are_not_taken_for_half(tiny_student):
    graph = build(tiny_student, ExportOptions(precision="fp16"), "unet_decoder")
    steps = steps_in_half(graph)
    sums = {name: half for (path, name, _), half in steps.items() if path == "rows.combine"}
    assert sums
    assert not any(sums.values())
    norms = {path for path, name, _ in steps if name == "group_norm"}
    assert norms
    for path in norms:
        assert not steps[path, "weight", 0]
        assert steps[path, "group_norm", 0]  # computed in float32, handed on in half
    assert all(half for (_, name, _), half in steps.items() if name in ("conv2d", "linear"))


def test_an_audit_leaves_no_hook_and_no_change_behind(tiny_student):
    before = {name: (p.data_ptr(), p.dtype) for name, p in tiny_student.named_parameters()}
    kinds = {name: type(module) for name, module in tiny_student.named_modules()}
    list(audit_student(tiny_student, ExportOptions(), None, ["a fox"]))
    assert before == {n: (p.data_ptr(), p.dtype) for n, p in tiny_student.named_parameters()}
    assert kinds == {name: type(module) for name, module in tiny_student.named_modules()}
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks


def test_masks_are_no_activations_but_nan_and_infinity_are_told():
    lowest = torch.finfo(torch.float32).min
    assert largest_value(torch.tensor([-3.0, 2.0, lowest, -torch.inf])) == 3
    assert largest_value(torch.tensor([lowest])) == 0
    assert largest_value(torch.zeros(0)) == 0
    assert largest_value(torch.tensor([1.0, torch.inf])) == math.inf
    assert math.isnan(largest_value(torch.tensor([-torch.inf, torch.nan])))


SIDES = st.integers(1, 9)


@FEW
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([1, 64, 1 << 20]))
def test_scores_in_blocks_equal_scores_at_once(count, length, keys, width, block_bytes):
    random = torch.Generator().manual_seed(count)
    query = torch.randn(2, count, length, width, generator=random)
    key = torch.randn(2, count, keys, width, generator=random)
    value = torch.randn(2, count, keys, width, generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_module, "_SCORES_BYTES", block_bytes)
        found = largest_product(query, key)
        mixed = half_attention(query.half(), key.half(), value.half())
    assert found == pytest.approx(float((query @ key.transpose(-1, -2)).abs().max()), rel=1e-5)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert mixed.dtype == torch.float16
    assert torch.allclose(mixed.float(), expected, atol=0.02)


@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_half_attention_masks_as_torch_does(kind):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8, generator=random) for _ in range(3))
    mask = torch.rand(2, 1, 5, 5, generator=random) > 0.4
    mask[..., 0] = True
    options: dict[str, Any] = {"is_causal": True}
    if kind != "causal":
        additive = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
        options = {"attn_mask": mask if kind == "boolean" else additive}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    mixed = half_attention(query.half(), key.half(), value.half(), **options)
    assert torch.allclose(mixed.float(), expected, atol=0.01)


# The rule.


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[str], dict[str, float]]:
    """Paths of a module tree, and max|output| of those modules that are called."""
    paths = [""]
    for _ in range(draw(st.integers(1, 15))):
        parent = draw(st.sampled_from(paths))
        paths.append(f"{parent}.{len(paths)}".lstrip("."))
    sizes = st.sampled_from([0.0, HOT_ABOVE / 2, HOT_ABOVE, HOT_ABOVE * 1.01, HALF_MAX * 2])
    called = {path: draw(sizes) for path in paths if draw(st.booleans())}
    return paths, called


@FEW
@given(trees(), st.data())
def test_an_island_is_the_smallest_called_module_that_is_safe_to_hand_on(tree, data):
    paths, outputs = tree
    module = data.draw(st.sampled_from(paths))
    island = island_of(module, outputs)
    assert lies_in(module, [island])
    around = [path for path in paths if lies_in(module, [path]) and path]
    safe = [path for path in around if outputs.get(path, math.inf) <= HOT_ABOVE]
    assert island == max(safe, key=len, default="")


@FEW
@given(trees(), st.data())
def test_islands_do_not_overlap_and_hold_every_hot_value(tree, data):
    paths, outputs = tree
    values = st.floats(0, 2 * HALF_MAX)
    ranges = tuple(
        sorted(
            (
                OpRange("g", path, "op", data.draw(values), data.draw(st.booleans()))
                for path in data.draw(st.lists(st.sampled_from(paths), max_size=8))
            ),
            key=lambda found: -found.max_abs,
        )
    )
    graph = GraphRanges("g", ranges, outputs)
    islands = graph.islands()
    roots = [island.module for island in islands]
    for found in ranges:
        homes = [root for root in roots if lies_in(found.module, [root])]
        assert len(homes) == 1 if found.hot else len(homes) <= 1
    assert all(island.cause.hot for island in islands)
    assert {island.module for island in islands} == set(float32_parts([graph]).of("g"))
    left = graph.audit().max_abs_in_half
    assert left <= HOT_ABOVE


def test_graph_borders_that_are_hot_are_named():
    ranges = (
        OpRange("g", "", "output mid_sample", HALF_MAX, True),
        OpRange("g", "", "input sample", HALF_MAX, False),
    )
    parts = float32_parts([GraphRanges("g", ranges, {})])
    assert parts == Float32Parts({"g": frozenset({""})}, frozenset({"mid_sample"}))


@pytest.mark.parametrize(
    ("path", "node"),
    [
        ("unet.down_blocks.0", "down_blocks.0"),
        ("rows.up_blocks.1.resnets.0", "up_blocks.1.resnets.0"),
        ("shared.resnets.up0_resnet0", "shared.resnets.up0_resnet0"),
        ("vae.decoder", "decoder"),
        ("rows", "rows"),
        ("", ""),
    ],
)
def test_module_paths_are_written_as_in_node_names(path, node):
    assert node_path(path) == node


def test_an_audit_survives_its_file():
    found = OpRange("unet_encoder", "unet.conv_in", "conv2d", 30000.0, True)
    graph = GraphRanges("unet_encoder", (found,), {"unet.conv_in": 30000.0}).audit()
    audit = OverflowAudit("a real prompt", (graph,))
    assert OverflowAudit.from_json(audit.to_json(), "audit") == audit
    with pytest.raises(BundleError, match=r"fp16\.json is not JSON"):
        OverflowAudit.from_json("{", "fp16.json")
    with pytest.raises(BundleError, match=r"fp16\.json has unknown fields: extra"):
        OverflowAudit.from_json('{"extra": 1}', "fp16.json")


# What goes wrong.


def test_a_path_that_the_graph_lacks_is_refused(tiny_student):
    parts = Float32Parts({"unet_encoder": frozenset({"unet.conv_out"})})
    options = ExportOptions(precision="fp16", float32=parts)
    with pytest.raises(UsageError, match=r"unet_encoder cannot keep unet.conv_out in float32"):
        build_graphs(tiny_student, options, UNET)


def test_values_that_leave_float32_are_no_matter_of_half_precision(tiny_student):
    student = copy.deepcopy(tiny_student)
    with torch.no_grad():
        student.unet.conv_in.bias[0] = torch.nan
    with pytest.raises(ParityError) as caught:
        list(audit_student(student, ExportOptions(), None, ["a fox"]))
    assert "unet_encoder gives non-finite values in float32 already, in unet.conv_in" in str(
        caught.value
    )


def test_an_unknown_vae_precision_lists_the_legal_ones():
    with pytest.raises(UsageError, match="auto, bf16, fp16, fp32"):
        ExportOptions(vae_precision="int8")


def test_an_audit_needs_a_prompt(tiny_student):
    with pytest.raises(UsageError, match="no prompt to audit on"):
        list(audit_student(tiny_student, ExportOptions(), None, []))


# The command line.


def test_audit_prints_the_largest_activations_and_what_stays_in_float32(
    run, tiny_student, tiny_pipeline, tmp_path
):
    student = with_hot_product(tiny_student, DOWN)
    student.unet.save_pretrained(tmp_path / "unet")
    code, out, _ = run("audit", "--ckpt", tmp_path / "unet", "--base", tiny_pipeline, "--top", 2)
    assert code == 0
    assert "Largest activations (half precision ends at 65504)" in out
    assert f"unet_encoder/{DOWN}.ff stays in float32: mul in {DOWN}.ff.net.0 reaches" in out
    assert "vae_decoder: half precision holds all" in out


def test_audit_reads_prompts_and_prints_json(run, tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n\na boat\na house\n", "utf-8")
    code, out, _ = run(
        "audit", "--ckpt", tiny_pipeline, "--prompts", "prompts.txt", "--top", 3, "--json"
    )
    assert code == 0
    data = json.loads(out)
    assert data["inputs"] == "3 prompt(s), seeded noise"
    assert [g["graph"] for g in data["graphs"]] == ["text_encoder", *UNET, "vae_decoder"]
    assert all(len(graph["largest"]) == 3 and not graph["islands"] for graph in data["graphs"])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--top", 0), "--top is 0; expected 1 or more"),
        (("--prompts", "none.txt"), "--prompts none.txt cannot be read as UTF-8 text"),
        (("--hoist-into", "vae"), "unknown hoisting 'vae'"),
    ],
)
def test_audit_refuses_bad_requests(run, tiny_pipeline, arguments, part):
    code, _, err = run("audit", "--ckpt", tiny_pipeline, *arguments)
    assert code == 2
    assert part in err
