"""Measure how far a student's values reach on real prompts, and which of them fp16 graphs round.

The graphs of the fp32 student run as they are, under a mode that sees every torch operation; of
each result only its largest |value| is kept. What the fp16 graph holds in half is not guessed: that
graph is run too, on tensors without memory, and its dtypes are read off.

Memory on top of the run itself: one number an operation, and `_SCORES_BYTES` for a block of
attention scores, which torch's fused attention never writes down. Prompts pass through one part of
the student after the other, so that only one part's weights are in use at a time; what is kept of
each prompt in between is its text embedding and its latents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tiue_export.bundle.chain import SCALED_LATENTS, TOKENS, scaled_latents
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.drawing.vae_tiles import decode_in_tiles, tile_size
from tiue_export.errors import ParityError, UsageError
from tiue_export.graphs.build import Graph, build_graphs, gaussian_text, meta_twin, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.half_range import WHOLE_GRAPH, Float32Parts, GraphRanges, OpRange
from tiue_export.proof.parity import loop_to_check
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.sampler import sample
from tiue_export.specs import (
    CONTROLNET,
    RUNNING_ORDER,
    TEXT_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
    Feeds,
)
from tiue_export.student.model import Student

SCORES = "attention_scores"
_SCORES_BYTES = 32 << 20
# Attention masks are written as -inf or as the dtype's least number: no activation is that low.
_MASKED = -1e30
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
HALVES = (torch.float16, torch.bfloat16)

# Module path, operation, and its number among those of the same path and name.
Step = tuple[str, str, int]


def audit_student(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    recorder: RangeRecorder | None = None,
) -> Iterator[GraphRanges]:
    """Run the float32 student on `prompts`; yields each graph's findings as soon as they are whole.

    Prompt i draws its noise from seed i. Without a text encoder the prompts only count: the text
    embeddings are Gaussian, as in `capture`. `recorder` adds to what another run has recorded.
    """
    if not prompts:
        raise UsageError("there is no prompt to audit on", "Give a file with one prompt a line.")
    options = float32_options(options)
    recorder = recorder or RangeRecorder(student, options)
    texts = _embed(student, options, tokenizer, prompts, recorder)
    if TEXT_ENCODER in recorder.watched:
        yield recorder.ranges(TEXT_ENCODER)
    latents = _denoise(student, options, texts, recorder)
    for name in (CONTROLNET, *UNET_GRAPHS):
        if name in recorder.watched:
            yield recorder.ranges(name)
    if student.vae is not None and VAE_DECODER in recorder.only:
        pictures = _decode(student, options, latents, recorder)
        yield recorder.ranges(VAE_DECODER)
        if options.with_vae_encoder:
            (graph,) = build_graphs(student, options, only=(VAE_ENCODER,))
            for picture in pictures:
                with recorder.watching(graph):
                    run_graph(graph, {"sample": np.clip(picture, -1, 1)})
            yield recorder.ranges(VAE_ENCODER)


def float32_options(options: ExportOptions) -> ExportOptions:
    """The same graphs, all in float32."""
    return replace(options, precision="fp32", vae_precision="auto", float32=Float32Parts())


def _embed(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    prompts: Sequence[str],
    recorder: RangeRecorder,
) -> list[Array]:
    """What the UNet reads for each batch of prompts, the last one filled up: (B, L, D), with
    guidance (2B, L, D), the empty prompt's rows first.
    """
    shape, copies = shapes_of(student, options).text, student.plan.copies
    batches = [list(prompts[i : i + shape[0]]) for i in range(0, len(prompts), shape[0])]
    if student.text_encoder is None or tokenizer is None:
        rows = copies * shape[0]
        return [gaussian_text((rows, *shape[1:]), seed) for seed in range(len(batches))]
    (graph,) = build_graphs(student, options, only=(TEXT_ENCODER,))
    texts = []
    for batch in batches:
        filled = batch + [batch[-1]] * (shape[0] - len(batch))
        negative = [[""] * len(filled)] * (copies - 1)
        with recorder.watching(graph):
            runs = [run_graph(graph, {TOKENS: tokenizer(row)})[1] for row in (*negative, filled)]
        texts.append(np.concatenate([text for outputs in runs for text in outputs.values()]))
    return texts


def _denoise(
    student: Student, options: ExportOptions, texts: list[Array], recorder: RangeRecorder
) -> list[Array]:
    """What the VAE is fed (B, 4, H, W) for each batch of texts, by all passes of the plan."""
    shapes, scaled = shapes_of(student, options), []
    graphs = {graph.spec.name: graph for graph in build_graphs(student, options, only=UNET_GRAPHS)}
    plan = loop_to_check(student.plan, student.plan.copies * shapes.latents[0])

    def run(name: str, pool: Feeds) -> Mapping[str, Array]:
        with recorder.watching(graphs[name]):
            return run_graph(graphs[name], pool)[1]

    control = None
    if CONTROLNET in graphs:
        control = control_to_check(graphs[CONTROLNET].example[3].shape)
    for index, text in enumerate(texts):
        noises = noises_from_seed(index * shapes.latents[0], plan.noises, shapes.latents)
        latents = sample(plan, run, noises, text, control=control)
        scaled.append(scaled_latents(latents, shapes.vae_scaling_factor))
    return scaled


def _decode(
    student: Student, options: ExportOptions, latents: list[Array], recorder: RangeRecorder
) -> list[Array]:
    """Pictures (B, 3, 8H, 8W) of scaled latents, as whole or in tiles."""
    (graph,) = build_graphs(student, options, only=(VAE_DECODER,))

    def decode(tile: Array) -> Array:
        with recorder.watching(graph):
            return run_graph(graph, {SCALED_LATENTS: tile})[1]["sample"]

    return [decode_in_tiles(decode, array, tile_size(graph.spec)) for array in latents]


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


class RangeRecorder:
    """Collects the ranges of graphs that run inside `watching`: of several runs the largest."""

    def __init__(
        self, student: Student, options: ExportOptions, only: tuple[str, ...] = RUNNING_ORDER
    ) -> None:
        self.only = only
        self._student, self._options = student, options
        self._found: dict[str, dict[tuple[str, str, bool], float]] = {}
        self._outputs: dict[str, dict[str, float]] = {}
        self._half: dict[str, Mapping[Step, bool]] = {}

    @property
    def watched(self) -> tuple[str, ...]:
        """The graphs that were watched so far, in running order."""
        return tuple(name for name in RUNNING_ORDER if name in self._found)

    @contextmanager
    def watching(self, graph: Graph) -> Iterator[None]:
        """Record what `graph`, built in float32, computes meanwhile.

        Raises `ParityError` when an operation gives NaN or infinity in float32 already.
        """
        name = graph.spec.name
        if name not in self.only:
            yield
            return
        watch = _LargestValues(graph)
        with watch.recording():
            yield
        half = self._half_steps(name)
        found = self._found.setdefault(name, {})
        for step, value in watch.largest.items():
            # A step that the half graph lacks is taken for half: better an island too many.
            key = (step[0], step[1], half.get(step, True))
            found[key] = max(found.get(key, 0.0), value)
        outputs = self._outputs.setdefault(name, {})
        for path, value in watch.outputs.items():
            outputs[path] = max(outputs.get(path, 0.0), value)

    def ranges(self, graph: str) -> GraphRanges:
        """What was found in one graph so far."""
        found = [
            OpRange(graph, module, op, value, in_half)
            for (module, op, in_half), value in self._found[graph].items()
        ]
        # Stable: of equal values the one that was computed first stands first.
        found.sort(key=lambda one: -one.max_abs)
        return GraphRanges(graph, tuple(found), self._outputs[graph])

    def _half_steps(self, name: str) -> Mapping[Step, bool]:
        if name not in self._half:
            together = (CONTROLNET, *UNET_GRAPHS)  # built from the UNet's own features
            only = together if name in together else (name,)
            half = replace(float32_options(self._options), precision="fp16")
            # The student without its memory makes the same graphs, for nothing.
            for graph in build_graphs(meta_twin(self._student), half, only):
                self._half[graph.spec.name] = steps_in_half(graph)
        return self._half[name]


def steps_in_half(graph: Graph) -> Mapping[Step, bool]:
    """For each step of a graph, whether its result is in half or is rounded to half later on.

    The graph is run on tensors without memory.
    """
    twin = replace(graph, module=meta_twin(graph.module))
    watch = _HeldInHalf(twin)
    with torch.no_grad(), watch.recording():
        twin.module(*(tensor.to("meta") for tensor in graph.example))
    return watch.in_half


class _Watch(TorchFunctionMode):
    """Shows every operation's floating results, with the path of the module that it runs in."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        self._paths: dict[int, list[str]] = {}
        for path, module in graph.module.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self._stack = [WHOLE_GRAPH]
        self._counts: Counter[tuple[str, str]] = Counter()
        self._looking = False  # our own operations are not shown

    def see(self, step: Step, tensors: list[Tensor]) -> None:
        """A step gave these; also called for weights, and for the graph's inputs and outputs."""
        raise NotImplementedError

    def see_scores(self, step: Step, query: Tensor, key: Tensor, scale: float) -> None:
        """Attention over (..., T, d) and (..., S, d) forms the scores query @ key^T * scale."""
        raise NotImplementedError

    def see_cast(self, source: Tensor, result: Tensor) -> None:
        """A tensor was cast."""

    def see_return(self, path: str, tensors: list[Tensor]) -> None:
        """A module returned these."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch whatever runs in the block. The weights are shown first."""
        for path, module in self._graph.module.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if tensor.is_floating_point():
                    self.see((path, name, 0), [tensor])
        # Not hooks on the modules: these are the student's, and are not touched.
        hooks = (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = _floats(result)
        if self._looking or len(self._stack) == 1 or not tensors:
            return result
        name = function.__name__.strip("_")
        if name in _CASTS:
            self.see_cast(args[0], tensors[0])
            return result
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            self.see_scores(self._next(SCORES), query, key, scale)
        self.see(self._next(name), tensors)
        return result

    def _next(self, name: str) -> Step:
        path = self._stack[-1]
        self._counts[path, name] += 1
        return path, name, self._counts[path, name] - 1

    def _enter(self, module: nn.Module, args: Any) -> None:
        known = self._paths.get(id(module), [self._stack[-1]])
        # One module may stand in two places, such as an activation: the caller tells them apart.
        inside = (path for path in known if path.startswith(f"{self._stack[-1]}."))
        self._stack.append(next(inside, known[0]))
        if module is self._graph.module:
            self._see_borders("input", [spec.name for spec in self._graph.spec.inputs], args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self._stack.pop()
        if id(module) not in self._paths or output is None:
            return
        self._looking = True
        try:
            self.see_return(path, _floats(output))
        finally:
            self._looking = False
        if module is self._graph.module:
            self._see_borders("output", [spec.name for spec in self._graph.spec.outputs], output)

    def _see_borders(self, kind: str, names: list[str], tensors: Sequence[Tensor]) -> None:
        self._looking = True
        try:
            for name, tensor in zip(names, tensors, strict=True):
                if tensor.is_floating_point():
                    self.see((WHOLE_GRAPH, f"{kind} {name}", 0), [tensor])
        finally:
            self._looking = False


class _LargestValues(_Watch):
    """Keeps the largest |value| of every step and of every module's output."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.largest: dict[Step, float] = {}
        self.outputs: dict[str, float] = {}
        # A module's output is some operation's result: it need not be read twice.
        self._known = WeakTensorKeyDictionary()

    def see(self, step: Step, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._known[tensor] = largest_value(tensor)
        self._keep(step, max(self._known[tensor] for tensor in tensors))

    def see_scores(self, step: Step, query: Tensor, key: Tensor, scale: float) -> None:
        self._keep(step, abs(scale) * largest_product(query, key))

    def see_return(self, path: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor not in self._known:
                self._known[tensor] = largest_value(tensor)
            self.outputs[path] = max(self.outputs.get(path, 0.0), self._known[tensor])

    def _keep(self, step: Step, value: float) -> None:
        if not math.isfinite(value):
            where = f"{step[0]}/{step[1]}".lstrip("/")
            raise ParityError(
                f"{self._graph.spec.name} gives non-finite values in float32 already, in {where}",
                "The checkpoint is damaged or was trained wrongly: no precision can carry it.",
            )
        self.largest[step] = value


class _HeldInHalf(_Watch):
    """Finds which steps' results are in half precision, or are rounded to it later."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.in_half: dict[Step, bool] = {}
        # With the tensor itself: an id is only its own while it lives.
        self._made_by: dict[int, tuple[Tensor, Step]] = {}

    def see(self, step: Step, tensors: list[Tensor]) -> None:
        self.in_half[step] = any(tensor.dtype in HALVES for tensor in tensors)
        for tensor in tensors:
            self._made_by[id(tensor)] = tensor, step

    def see_scores(self, step: Step, query: Tensor, key: Tensor, scale: float) -> None:
        self.in_half[step] = query.dtype in HALVES

    def see_cast(self, source: Tensor, result: Tensor) -> None:
        if id(source) in self._made_by:
            _, step = self._made_by[id(source)]
            self.in_half[step] |= result.dtype in HALVES
            self._made_by[id(result)] = result, step


def largest_value(tensor: Tensor) -> float:
    """max|tensor|, without what masks attention; NaN or infinity where the tensor holds either."""
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(tensor.detach()))
    if low <= _MASKED:
        kept = tensor[tensor > _MASKED]
        low, high = (float(end) for end in torch.aminmax(kept)) if kept.numel() else (0.0, 0.0)
    return max(abs(low), abs(high))


def largest_product(query: Tensor, key: Tensor) -> float:
    """max|query @ key^T| over (..., T, d) and (..., S, d), in blocks of `_SCORES_BYTES`."""
    key = key.expand(*query.shape[:-2], *key.shape[-2:])
    query, key = query.flatten(0, -3), key.flatten(0, -3)  # (N, T, d), (N, S, d)
    blocks = score_blocks(len(query), query.shape[1], key.shape[1])
    return max(largest_value(query[n, t] @ key[n].transpose(1, 2)) for n, t in blocks)


def score_blocks(count: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut `count` float32 matrices (rows, columns) into blocks of at most `_SCORES_BYTES`.

    Yields which matrices and which of their rows; a block is one row at least.
    """
    height = max(1, _SCORES_BYTES // (4 * columns))
    depth = max(1, height // rows)
    for n in range(0, count, depth):
        for t in range(0, rows, height):
            yield slice(n, n + depth), slice(t, t + height)


def _floats(result: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
