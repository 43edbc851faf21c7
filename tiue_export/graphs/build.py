"""Student -> the four graphs to export, each a module with its contract and example inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiue_export.errors import UnsupportedModelError, UsageError, first_line
from tiue_export.graphs.folded import (
    NaiveDecoder,
    TextEncoder,
    UNetEncoder,
    VaeDecoder,
    VaeEncoder,
)
from tiue_export.graphs.hoisting import RowDecoder, SharedDecoder, hoist, hoist_any_time
from tiue_export.graphs.lowering import NO_PATHS, InFloat32, ModulePaths, below, compute_in_float32
from tiue_export.graphs.options import DTYPES, ExportOptions
from tiue_export.graphs.shapes import Shapes, shapes_of
from tiue_export.graphs.timed import (
    ControlNet,
    TimedDecoder,
    TimedEncoder,
    TimedNaiveDecoder,
    TimedSharedRows,
    TimedSharingEncoder,
    TimeEmbedding,
)
from tiue_export.graphs.upsampling import with_subpixel_upsampling
from tiue_export.registry.support import check_support
from tiue_export.sampling.plan import Plan, steps_within
from tiue_export.specs import (
    BATCH,
    CONTROLNET,
    RUNNING_ORDER,
    STEPS,
    SUBPIXEL,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    VAE_ENCODER,
    VAE_GRAPHS,
    Array,
    Feeds,
    GraphSpec,
    TensorSpec,
    axis_size,
)
from tiue_export.student.model import Student
from tiue_export.student.up_path import shares_all

_EXAMPLE_STEPS = 3  # not 2: with one image that is the number of rows too


@dataclass(frozen=True)
class Graph:
    """One graph to export. `module(*example)` returns a tuple in the order of `spec.outputs`.

    `float32` are the module paths that compute in float32 in a half-precision graph, beside norms.
    """

    spec: GraphSpec
    module: nn.Module
    example: tuple[Tensor, ...]
    precision: str
    float32: ModulePaths

    @property
    def weight_bytes(self) -> int:
        """Size of all weights and constants, each counted once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    def at_steps(self, steps: int) -> Graph:
        """The graph with a loop's open axis closed, for formats that take one number of steps."""

        def closed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            sizes = {STEPS: steps}
            return tuple(
                replace(each, shape=tuple(axis_size(side, sizes) for side in each.shape))
                for each in tensors
            )

        spec = replace(
            self.spec, inputs=closed(self.spec.inputs), outputs=closed(self.spec.outputs)
        )
        example = tuple(
            tensor.new_zeros(steps) if each.name == "timesteps" else tensor
            for each, tensor in zip(spec.inputs, self.example, strict=True)
        )
        return replace(self, spec=spec, example=example)


def exported_plan(student: Student, options: ExportOptions) -> Plan:
    """The student's plan with rows merged, and parted, as the options ask.

    Rows that part behind the last block differ in nothing: one is left of them.
    """
    plan = student.plan.merged(options.merge_below)
    if options.fan_out is not None:
        plan = plan.parting_at(options.fan_out)
    return plan.collapsed() if shares_all(student.unet.up_blocks, plan.fan_out) else plan


def gaussian_text(shape: tuple[int, int, int], seed: int = 0) -> Array:
    """Stands for a text embedding (B, L, D) where there is no text encoder.

    A text encoder ends in a LayerNorm: its output has about unit variance per token.
    """
    random = np.random.RandomState(seed).standard_normal(shape)
    return random.astype(np.float32)


def run_graph(graph: Graph, pool: Feeds) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run a graph in torch on its inputs out of `pool`; (feeds, outputs), outputs in float32."""
    feeds = graph.spec.select(pool)
    with torch.no_grad():
        outputs = graph.module(*(torch.from_numpy(array) for array in feeds.values()))
    names = [spec.name for spec in graph.spec.outputs]
    arrays = (output.detach().float().numpy() for output in outputs)
    return feeds, dict(zip(names, arrays, strict=True))


def build_graphs(
    student: Student, options: ExportOptions, only: tuple[str, ...] = RUNNING_ORDER
) -> list[Graph]:
    """The graphs this student has the parts for, in running order; `only` leaves others unbuilt."""
    check_support("onnx", student_features(student) | options.features, student.source.name)
    plan = exported_plan(student, options)
    if student.controlnet is not None and plan.guidance is None:
        raise UsageError(
            f"{student.source.name} has its guidance distilled in; a ControlNet steers models that "
            "draw with guidance",
            "Leave the ControlNet out, or export an ordinary model with --method faster.",
        )
    if plan.max_decoder_rows is not None:  # a bound that leaves out a whole step is refused
        steps_within(plan.max_decoder_rows, plan.copies * options.batch)
    shapes = shapes_of(student, options)
    if options.upsampling == SUBPIXEL:
        student = _with_subpixel_upsampling(student, only)
    graphs = []
    if student.text_encoder is not None and TEXT_ENCODER in only:
        module = TextEncoder(student.text_encoder, *_precision(TEXT_ENCODER, options))
        ids = torch.zeros((shapes.text[0], shapes.tokens), dtype=torch.int64)
        inputs = {"input_ids": ids}
        graphs.append(_graph(TEXT_ENCODER, module, inputs, ["last_hidden_state"], options))
    if student.vae is not None and options.with_vae_encoder and VAE_ENCODER in only:
        inputs = {"sample": torch.zeros(shapes.latents[0], 3, *shapes.picture_px)}
        encoder = VaeEncoder(student.vae, *_precision(VAE_ENCODER, options))
        names = [vae_encoder_output(student.vae)]
        graphs.append(_graph(VAE_ENCODER, encoder, inputs, names, options))
    if {CONTROLNET, *UNET_GRAPHS} & set(only):
        build = _folded_unet_graphs if plan.one_pass else _timed_unet_graphs
        graphs += build(student, options, shapes)
    if student.vae is not None and VAE_DECODER in only:
        inputs = {"latent_sample": torch.zeros(shapes.vae_input)}
        module_vae = VaeDecoder(student.vae, *_precision(VAE_DECODER, options))
        graphs.append(_graph(VAE_DECODER, module_vae, inputs, ["sample"], options))
    return graphs


def vae_encoder_output(vae: Any) -> str:
    """The name of what the VAE encoder gives: parameters of a distribution, or latents."""
    return "latent_parameters" if hasattr(vae, "quant_conv") else "latent_sample"


def taking_pictures(student: Student, options: ExportOptions) -> Student:
    """The student whose drawing may start from a picture, where the options ask for it.

    A few-step student's single timestep is then an input of its graphs, as those of several are:
    where it starts from a picture, it starts later. A TiUE student starts where its encoder was
    trained. Raises `UsageError` for a model without a VAE.
    """
    if not options.with_vae_encoder:
        return student
    if student.vae is None:
        raise UsageError(
            f"{student.source.name} brings no VAE, whose encoder --with-vae-encoder asks for",
            "Give --base PIPELINE_FOLDER, or --vae, or leave --with-vae-encoder out.",
        )
    if student.plan.one_pass and student.plan.recipe:
        return student.by_plan(replace(student.plan, open_time=True))
    return student


def _with_subpixel_upsampling(student: Student, only: tuple[str, ...]) -> Student:
    """The student whose UNet and VAE, as far as their graphs are asked for, upsample that way."""
    unet, vae = student.unet, student.vae
    if set(UNET_GRAPHS) & set(only):
        unet = with_subpixel_upsampling(unet)
    if vae is not None and VAE_DECODER in only:
        vae = with_subpixel_upsampling(vae)
    return student.of_parts(unet, student.text_encoder, vae, student.controlnet)


def _precision(graph: str, options: ExportOptions) -> tuple[torch.dtype, ModulePaths]:
    """The dtype to build a graph in, and what stays in float32 if that is half."""
    return DTYPES[options.precision_of(graph)], options.float32.of(graph)


def _folded_unet_graphs(student: Student, options: ExportOptions, shapes: Shapes) -> list[Graph]:
    """Encoder and decoder with timesteps and constants folded in, for rows of one pass."""
    plan = exported_plan(student, options)
    unet, picture_px = student.unet, shapes.picture_px
    (dtype, islands), (rows_dtype, rows_islands) = (
        _precision(name, options) for name in UNET_GRAPHS
    )
    request = {
        "sample": torch.zeros(shapes.latents),
        "encoder_hidden_states": torch.zeros(
            shapes.text, dtype=options.carried_in("encoder_hidden_states")
        ),
    }
    names = _feature_names(unet)
    encoder: nn.Module
    decoder: nn.Module
    if options.hoist == "encoder":
        # The shared part lies in the encoder's graph: its precision and paths are that graph's.
        both = islands | rows_islands
        shared, rows = hoist(unet, plan, picture_px, dtype, both, rows_dtype)
        own = UNetEncoder(unet, plan, picture_px, dtype, below(islands, "encoder"))
        encoder = SharingEncoder(own, shared)
        names = _shared_names(encoder, request, dtype)
        decoder = SharedRows(rows, names)
    else:
        encoder = UNetEncoder(unet, plan, picture_px, dtype, islands)
        if options.hoist == "none":
            decoder = NaiveDecoder(unet, plan, picture_px, rows_dtype, rows_islands)
        else:
            cut = hoist(unet, plan, picture_px, rows_dtype, rows_islands)
            decoder = HoistedDecoder(*cut)
    encoder_graph = _graph(UNET_ENCODER, encoder, request, names, options)
    if options.hoist == "encoder":
        del request["encoder_hidden_states"]
    request |= _handed_on(encoder_graph.spec, options)
    decoder_graph = _graph(UNET_DECODER, decoder, request, ["latents"], options)
    return [encoder_graph, decoder_graph]


def _handed_on(encoder: GraphSpec, options: ExportOptions) -> dict[str, Tensor]:
    """The decoder's example inputs that are the encoder's outputs, at the example batch."""
    sizes = {BATCH: options.example_batch}
    return {
        spec.name: torch.zeros(
            [axis_size(side, sizes) for side in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in encoder.outputs
    }


def _feature_names(unet: Any) -> list[str]:
    skips = 1 + sum(len(b.resnets) + len(b.downsamplers or ()) for b in unet.down_blocks)
    mid = [] if unet.mid_block is None else ["mid_sample"]
    return [*mid, *(f"down_res_{i}" for i in range(skips))]


def student_features(student: Student) -> frozenset[str]:
    """Which features of `registry/support.py` every bundle of this student has."""
    present = {
        "passes": not student.plan.one_pass,
        "guidance": student.plan.guidance is not None,
        "fresh-noise": student.plan.noises > 1,
        "controlnet": student.controlnet is not None,
        "fan-out": bool(student.plan.fan_out),
    }
    return frozenset(name for name, there in present.items() if there)


def _timed_unet_graphs(student: Student, options: ExportOptions, shapes: Shapes) -> list[Graph]:
    """Encoder at one timestep, decoder at any number of them; with guidance rows are 2B."""
    (dtype, islands), (rows_dtype, rows_islands) = (
        _precision(name, options) for name in UNET_GRAPHS
    )
    unet, rows = student.unet, student.plan.copies * shapes.latents[0]
    picture_px, latents = shapes.picture_px, shapes.latents
    embedding = torch.zeros(
        (rows, *shapes.text[1:]), dtype=options.carried_in("encoder_hidden_states")
    )
    request = {
        "sample": torch.zeros(rows, *latents[1:]),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": embedding,
    }
    names = _feature_names(unet)
    encoder: nn.Module
    decoder: nn.Module
    if options.hoist == "encoder":
        both = islands | rows_islands
        shared, body = hoist_any_time(unet, picture_px, dtype, both, rows_dtype)
        own = TimedEncoder(unet, picture_px, dtype, below(islands, "encoder"))
        encoder = TimedSharingEncoder(own, shared)
        names = _shared_names(encoder, request, dtype)
        decoder = TimedSharedRows(body, names, TimeEmbedding(unet, rows_dtype))
    else:
        encoder = TimedEncoder(unet, picture_px, dtype, islands)
        if options.hoist == "none":
            decoder = TimedNaiveDecoder(unet, picture_px, rows_dtype, rows_islands)
        else:
            cut = hoist_any_time(unet, picture_px, rows_dtype, rows_islands)
            decoder = TimedDecoder(*cut, TimeEmbedding(unet, rows_dtype))
    encoder_graph = _graph(UNET_ENCODER, encoder, request, names, options)
    control = _control_graphs(student, options, request, names)
    open_rows = student.plan.open_rows
    steps = _EXAMPLE_STEPS if open_rows else 1
    features: dict[str, Tensor] = {"timesteps": torch.zeros(steps)}
    if options.hoist != "encoder":
        features["encoder_hidden_states"] = embedding
    features |= _handed_on(encoder_graph.spec, options)
    outputs = STEPS if rows == 1 else f"{rows}*{STEPS}"
    open_axes = {"timesteps": STEPS, "outputs": outputs} if open_rows else {}
    decoder_graph = _graph(UNET_DECODER, decoder, features, ["outputs"], options, open_axes)
    return [*control, encoder_graph, decoder_graph]


def _control_graphs(
    student: Student, options: ExportOptions, request: Mapping[str, Tensor], names: list[str]
) -> list[Graph]:
    """The ControlNet's graph where there is one; its outputs have the names of what they add to."""
    if student.controlnet is None:
        return []
    rows, _, height, width = request["sample"].shape
    scale = student.px_per_latent
    inputs = {
        **request,
        "controlnet_cond": torch.zeros(rows // 2, 3, height * scale, width * scale),
        "conditioning_scale": torch.ones(1),
    }
    module = ControlNet(student.controlnet, *_precision(CONTROLNET, options))
    return [_graph(CONTROLNET, module, inputs, names, options)]


def _shared_names(
    encoder: nn.Module, request: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """Names of what a sharing encoder hands on, in order, found without computing anything."""
    twin = meta_twin(encoder)
    *inputs, text = (tensor.to("meta") for tensor in request.values())
    features = twin.encoder(*inputs, text.to(dtype))
    return list(twin.shared(text.to(dtype), *features))


class HoistedDecoder(nn.Module):
    """sample, encoder_hidden_states, mid, skips -> latents, shared part and rows in one graph."""

    def __init__(self, shared: SharedDecoder, rows: RowDecoder) -> None:
        super().__init__()
        self.shared, self.rows = shared, rows

    def forward(
        self, sample: Tensor, encoder_hidden_states: Tensor, *features: Tensor
    ) -> tuple[Tensor, ...]:
        return (self.rows(sample, self.shared(encoder_hidden_states, *features)),)


class SharingEncoder(nn.Module):
    """The encoder that also computes the decoder's time-independent part."""

    def __init__(self, encoder: nn.Module, shared: SharedDecoder) -> None:
        super().__init__()
        self.encoder, self.shared = encoder, shared

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder(sample, encoder_hidden_states)
        return tuple(self.shared(encoder_hidden_states, *features).values())


class SharedRows(nn.Module):
    """The decoder rows, fed by the encoder's shared tensors."""

    def __init__(self, rows: RowDecoder, names: list[str]) -> None:
        super().__init__()
        self.rows, self.names = rows, names

    def forward(self, sample: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        return (self.rows(sample, dict(zip(self.names, shared, strict=True))),)


_MEANINGS = {
    "input_ids": "CLIP token ids, padded to the text length",
    "last_hidden_state": "text embedding",
    "encoder_hidden_states": "text embedding",
    "sample": "initial noise",
    "mid_sample": "output of the UNet's mid block",
    "latent_parameters": "mean and logarithm of the variance of latents",
    "latents": "image latents, Eq. 11 applied",
    "timestep": "the pass's timestep",
    "timesteps": "timesteps of the decoder's steps",
    "outputs": "the network's outputs, step-major",
    "controlnet_cond": "picture that steers, in [0, 1]",
    "conditioning_scale": "strength of the ControlNet",
    "latent_sample": "latents divided by the VAE scaling factor",
}


def _graph(
    name: str,
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output_names: list[str],
    options: ExportOptions,
    open_axes: Mapping[str, str] = MappingProxyType({}),
) -> Graph:
    """`open_axes` names the first axis of tensors where it is not the batch."""
    module = module.eval()
    islands = options.float32.of(name) if options.precision_of(name) == "fp16" else NO_PATHS
    if options.precision == "fp16" and options.precision_of(name) == "fp32":
        compute_in_float32(module, [_carried(key, name, options) for key in output_names])
    _check_islands(name, module, islands)
    try:
        with torch.no_grad():
            outputs = meta_twin(module)(*(tensor.to("meta") for tensor in inputs.values()))
    except Exception as error:  # a configuration that weights fit may still compute nothing
        raise UnsupportedModelError(
            f"{name} cannot be computed: {first_line(error)}",
            "Restore the config.json that belongs to its weights.",
        ) from error
    spec = GraphSpec(
        name,
        tuple(_spec(key, tensor, name, options, open_axes) for key, tensor in inputs.items()),
        tuple(
            _spec(key, tensor, name, options, open_axes)
            for key, tensor in zip(output_names, outputs, strict=True)
        ),
    )
    return Graph(spec, module, tuple(inputs.values()), options.precision_of(name), islands)


def _carried(tensor: str, graph: str, options: ExportOptions) -> torch.dtype:
    """The dtype of a graph's output: latents and pictures are float32 at every precision."""
    final = graph in (UNET_DECODER, *VAE_GRAPHS)
    return torch.float32 if final else options.carried_in(tensor)


def _check_islands(graph: str, module: nn.Module, islands: ModulePaths) -> None:
    """Refuse module paths that the graph does not have or that nothing calls by that name."""
    built = {path for path, child in module.named_modules() if isinstance(child, InFloat32)}
    if unknown := sorted(islands - built):
        raise UsageError(
            f"{graph} cannot keep {', '.join(unknown)} in float32: it has no such module",
            "Take the paths from an audit of this student with the same hoisting.",
        )


def _spec(
    name: str, tensor: Tensor, graph: str, options: ExportOptions, open_axes: Mapping[str, str]
) -> TensorSpec:
    batch: int | str = BATCH if options.dynamic_batch else int(tensor.shape[0])
    batch = open_axes.get(name, batch)
    meaning = _MEANINGS.get(name, "encoder feature")
    if graph in VAE_GRAPHS and name == "sample":
        meaning = "picture in [-1, 1]"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, dtype, (batch, *(int(side) for side in tensor.shape[1:])), meaning)


def meta_twin(module: Any) -> Any:
    """A copy without memory, to learn output shapes by running it on nothing."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    memo.update({id(buffer): buffer.to("meta") for buffer in module.buffers()})
    return copy.deepcopy(module, memo)
