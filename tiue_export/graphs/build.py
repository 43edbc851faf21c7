"""Student -> the four graphs to export, each a module with its contract and example inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiue_export.errors import UsageError, unknown_name
from tiue_export.graphs.hoisting import RowDecoder, SharedDecoder, hoist, hoist_any_time
from tiue_export.graphs.loop import (
    ControlNet,
    GroupDecoder,
    KeyEncoder,
    NaiveGroupDecoder,
    SharedGroupRows,
    SharingKeyEncoder,
    TimeEmbedding,
)
from tiue_export.graphs.lowering import NO_PATHS, InFloat32, ModulePaths, below, compute_in_float32
from tiue_export.graphs.one_pass import NaiveDecoder, TextEncoder, UNetEncoder, VaeDecoder
from tiue_export.proof.half_range import WHOLE_GRAPH, Float32Parts
from tiue_export.sampling.plan import FasterPlan, steps_within
from tiue_export.sampling.schedule import Schedule
from tiue_export.specs import (
    BATCH,
    CONTROLNET,
    GRAPH_NAMES,
    STEPS,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    VAE_DECODER,
    Array,
    Feeds,
    GraphSpec,
    TensorSpec,
)
from tiue_export.student.model import Student

PRECISIONS: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
VAE_PRECISIONS = ("auto", "fp16", "fp32", "bf16")
_DTYPES = {**PRECISIONS, "bf16": torch.bfloat16}
HOISTS = ("decoder", "encoder", "none")
_DEFAULT_VAE_SCALE = 8
_SMALLEST_TILE = 8  # latents: below, group norms have too few values to tell anything
_EXAMPLE_STEPS = 3  # not 2: with one image that is the number of rows too


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose. `height` and `width` in pixels, None for the model's own size.

    `hoist` says which graph computes the decoder's time-independent part, or "none" for the naive
    decoder. `batch` is the static batch, or the example batch when `dynamic_batch`.
    `vae_precision` "auto" is `precision`; `float32` names what a half-precision graph computes in
    float32, as an overflow audit finds it. `vae_tile`: the side in pixels of what the VAE decoder's
    graph draws at once, None for the whole picture.
    """

    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    batch: int = 1
    dynamic_batch: bool = False
    hoist: str = "decoder"
    merge_below: float = 0.0
    vae_precision: str = "auto"
    float32: Float32Parts = field(default_factory=Float32Parts)
    vae_tile: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.hoist not in HOISTS:
            raise unknown_name("hoisting", self.hoist, HOISTS)
        if self.vae_precision not in VAE_PRECISIONS:
            raise unknown_name("VAE precision", self.vae_precision, VAE_PRECISIONS)
        if self.batch < 1:
            raise UsageError(f"--batch is {self.batch}; expected 1 or more")
        if not 0 <= self.merge_below < math.inf:
            raise UsageError(
                f"--merge-below is {self.merge_below}; expected 0 or more (0.02 is usual)"
            )

    @property
    def example_batch(self) -> int:
        """Images in the example inputs: torch.export takes a 1 for a constant."""
        return max(2, self.batch) if self.dynamic_batch else self.batch

    def precision_of(self, graph: str) -> str:
        """The precision that one graph computes in: fp32, fp16 (with islands) or bf16."""
        if graph == VAE_DECODER and self.vae_precision != "auto":
            return self.vae_precision
        if WHOLE_GRAPH in self.float32.of(graph):
            return "fp32"
        return self.precision

    def carried_in(self, tensor: str) -> torch.dtype:
        """The dtype in which a text embedding or an encoder feature travels between graphs."""
        return torch.float32 if tensor in self.float32.tensors else PRECISIONS[self.precision]


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


def exported_schedule(student: Student, options: ExportOptions) -> Schedule:
    """The student's schedule with rows merged as the options ask."""
    return student.schedule.merged(options.merge_below) if options.merge_below else student.schedule


def latent_shape(student: Student, options: ExportOptions) -> tuple[int, int, int, int]:
    """(B, 4, H, W) of the latents; sizes that the UNet cannot halve evenly are refused."""
    scale = vae_scale(student)
    config = student.unet.config
    own = config.sample_size or 64
    own_height, own_width = own if isinstance(own, (list, tuple)) else (own, own)
    height = own_height * scale if options.height is None else options.height
    width = own_width * scale if options.width is None else options.width
    multiple = scale * 2 ** (len(config.block_out_channels) - 1)
    for name, side in (("--height", height), ("--width", width)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise UsageError(
                f"{name} is {side}; expected a multiple of {multiple} px for this student",
                f"The nearest is {name} {near}.",
            )
    return options.example_batch, 4, height // scale, width // scale


def vae_input_shape(student: Student, options: ExportOptions) -> tuple[int, int, int, int]:
    """(B, 4, h, w) of what the VAE decoder's graph takes: all latents, or one tile of them."""
    batch, channels, height, width = latent_shape(student, options)
    if options.vae_tile is None:
        return batch, channels, height, width
    scale, tile = vae_scale(student), options.vae_tile
    smallest, largest = _SMALLEST_TILE * scale, max(height, width) * scale - scale
    if not smallest <= tile <= largest or tile % scale:
        raise UsageError(
            f"--vae-tile is {tile}; expected a multiple of {scale} from {smallest} to {largest}, "
            f"as pictures are {width * scale}x{height * scale} px",
            "Leave it out to decode pictures whole.",
        )
    return batch, channels, min(height, tile // scale), min(width, tile // scale)


def vae_scale(student: Student) -> int:
    """Pixels per latent along one side."""
    if student.vae is None:
        return _DEFAULT_VAE_SCALE
    config = student.vae.config
    widths = getattr(config, "decoder_block_out_channels", None) or config.block_out_channels
    return int(2 ** (len(widths) - 1))


def vae_scaling_factor(student: Student) -> float:
    """The factor that the latents are divided by before the VAE (1.0 for AutoencoderTiny)."""
    return 0.18215 if student.vae is None else float(student.vae.config.scaling_factor)


def text_shape(student: Student, options: ExportOptions) -> tuple[int, int, int]:
    """(B, L, D) of the text embedding."""
    text = student.text_encoder
    length = 77 if text is None else int(text.config.max_position_embeddings)
    return options.example_batch, length, int(student.unet.config.cross_attention_dim)


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
    student: Student, options: ExportOptions, only: tuple[str, ...] = GRAPH_NAMES
) -> list[Graph]:
    """The graphs this student has the parts for, in running order; `only` leaves others unbuilt."""
    if student.plan is not None:
        _check_faster(student.plan, options)
    latents, text = latent_shape(student, options), text_shape(student, options)
    graphs = []
    if student.text_encoder is not None and TEXT_ENCODER in only:
        module = TextEncoder(student.text_encoder, *_precision(TEXT_ENCODER, options))
        inputs = {"input_ids": torch.zeros(text[:2], dtype=torch.int64)}
        graphs.append(_graph(TEXT_ENCODER, module, inputs, ["last_hidden_state"], options))
    if set(UNET_GRAPHS) & set(only):
        build = _unet_graphs if student.plan is None else _faster_unet_graphs
        graphs += build(student, options, latents, text)
    if student.vae is not None and VAE_DECODER in only:
        inputs = {"latent_sample": torch.zeros(vae_input_shape(student, options))}
        module_vae = VaeDecoder(student.vae, *_precision(VAE_DECODER, options))
        graphs.append(_graph(VAE_DECODER, module_vae, inputs, ["sample"], options))
    return graphs


def _precision(graph: str, options: ExportOptions) -> tuple[torch.dtype, ModulePaths]:
    """The dtype to build a graph in, and what stays in float32 if that is half."""
    return _DTYPES[options.precision_of(graph)], options.float32.of(graph)


def _unet_graphs(
    student: Student,
    options: ExportOptions,
    latents: tuple[int, int, int, int],
    text: tuple[int, int, int],
) -> list[Graph]:
    schedule = exported_schedule(student, options)
    (dtype, islands), (rows_dtype, rows_islands) = (
        _precision(name, options) for name in UNET_GRAPHS
    )
    request = {
        "sample": torch.zeros(latents),
        "encoder_hidden_states": torch.zeros(
            text, dtype=options.carried_in("encoder_hidden_states")
        ),
    }
    names = _feature_names(student.unet)
    encoder: nn.Module
    decoder: nn.Module
    if options.hoist == "encoder":
        # The shared part lies in the encoder's graph: its precision and paths are that graph's.
        shared, rows = hoist(student.unet, schedule, dtype, islands | rows_islands, rows_dtype)
        own = UNetEncoder(student.unet, schedule, dtype, below(islands, "encoder"))
        encoder = SharingEncoder(own, shared)
        names = encoder.output_names(request["sample"], request["encoder_hidden_states"].to(dtype))
        decoder = SharedRows(rows, names)
    else:
        encoder = UNetEncoder(student.unet, schedule, dtype, islands)
        if options.hoist == "none":
            decoder = NaiveDecoder(student.unet, schedule, rows_dtype, rows_islands)
        else:
            decoder = HoistedDecoder(*hoist(student.unet, schedule, rows_dtype, rows_islands))
    encoder_graph = _graph(UNET_ENCODER, encoder, request, names, options)
    features = {
        spec.name: torch.zeros(
            [_size(side, options) for side in spec.shape], dtype=getattr(torch, spec.dtype)
        )
        for spec in encoder_graph.spec.outputs
    }
    if options.hoist == "encoder":
        del request["encoder_hidden_states"]
    decoder_graph = _graph(UNET_DECODER, decoder, {**request, **features}, ["latents"], options)
    return [encoder_graph, decoder_graph]


def _feature_names(unet: Any) -> list[str]:
    skips = 1 + sum(len(b.resnets) + len(b.downsamplers or ()) for b in unet.down_blocks)
    return ["mid_sample", *(f"down_res_{i}" for i in range(skips))]


def _check_faster(plan: FasterPlan, options: ExportOptions) -> None:
    if plan.max_decoder_rows is not None:
        steps_within(plan.max_decoder_rows, 2 * options.batch)
    for name, wrong in (("--merge-below", options.merge_below > 0),):
        if wrong:
            raise UsageError(
                f"{name} is for distilled students; every step of Faster Diffusion counts",
                f"Leave {name} out.",
            )
    if options.dynamic_batch:
        raise UsageError(
            "--dynamic-batch and --method faster do not go together: the decoder's rows are the "
            "open axis",
            "Export with --batch N.",
        )


def _faster_unet_graphs(
    student: Student,
    options: ExportOptions,
    latents: tuple[int, int, int, int],
    text: tuple[int, int, int],
) -> list[Graph]:
    """Encoder at one timestep, decoder at any number of them, both for rows in two halves (2B)."""
    (dtype, islands), (rows_dtype, rows_islands) = (
        _precision(name, options) for name in UNET_GRAPHS
    )
    unet, rows = student.unet, 2 * latents[0]
    embedding = torch.zeros((rows, *text[1:]), dtype=options.carried_in("encoder_hidden_states"))
    request = {
        "sample": torch.zeros(rows, *latents[1:]),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": embedding,
    }
    names = _feature_names(unet)
    encoder: nn.Module
    decoder: nn.Module
    if options.hoist == "encoder":
        shared, body = hoist_any_time(unet, dtype, islands | rows_islands, rows_dtype)
        encoder = SharingKeyEncoder(KeyEncoder(unet, dtype, below(islands, "encoder")), shared)
        names = _shared_names(encoder, request, dtype)
        decoder = SharedGroupRows(body, names, TimeEmbedding(unet, rows_dtype))
    else:
        encoder = KeyEncoder(unet, dtype, islands)
        if options.hoist == "none":
            decoder = NaiveGroupDecoder(unet, rows_dtype, rows_islands)
        else:
            cut = hoist_any_time(unet, rows_dtype, rows_islands)
            decoder = GroupDecoder(*cut, TimeEmbedding(unet, rows_dtype))
    encoder_graph = _graph(UNET_ENCODER, encoder, request, names, options)
    control = _control_graphs(student, options, request, names)
    features: dict[str, Tensor] = {"timesteps": torch.zeros(_EXAMPLE_STEPS)}
    if options.hoist != "encoder":
        features["encoder_hidden_states"] = embedding
    for spec in encoder_graph.spec.outputs:
        shape = [_size(side, options) for side in spec.shape]
        features[spec.name] = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    open_axes = {"timesteps": STEPS, "outputs": f"{rows}*{STEPS}"}
    decoder_graph = _graph(UNET_DECODER, decoder, features, ["outputs"], options, open_axes)
    return [*control, encoder_graph, decoder_graph]


def _control_graphs(
    student: Student, options: ExportOptions, request: Mapping[str, Tensor], names: list[str]
) -> list[Graph]:
    """The ControlNet's graph where there is one; its outputs have the names of what they add to."""
    if student.controlnet is None:
        return []
    if options.hoist == "encoder":
        raise UsageError(
            "a ControlNet adds to the encoder's features, which --hoist-into encoder does not "
            "hand out",
            "Leave --hoist-into out.",
        )
    rows, _, height, width = request["sample"].shape
    scale = vae_scale(student)
    inputs = {
        **request,
        "controlnet_cond": torch.zeros(rows // 2, 3, height * scale, width * scale),
        "conditioning_scale": torch.ones(1),
    }
    module = ControlNet(student.controlnet, PRECISIONS[options.precision])
    return [_graph(CONTROLNET, module, inputs, names, options)]


def _shared_names(
    encoder: nn.Module, request: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """Names of what a sharing encoder hands on, in order, found without computing anything."""
    twin = meta_twin(encoder)
    sample, timestep, text = (tensor.to("meta") for tensor in request.values())
    features = twin.encoder(sample, timestep, text.to(dtype))
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

    def output_names(self, sample: Tensor, encoder_hidden_states: Tensor) -> list[str]:
        """Names of the outputs, in order, found without computing anything."""
        twin = meta_twin(self)
        features = twin.encoder(sample.to("meta"), encoder_hidden_states.to("meta"))
        return list(twin.shared(encoder_hidden_states.to("meta"), *features))

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
    "latents": "image latents, Eq. 11 applied",
    "timestep": "the key step's timestep",
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
    with torch.no_grad():
        outputs = meta_twin(module)(*(tensor.to("meta") for tensor in inputs.values()))
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
    final = graph in (UNET_DECODER, VAE_DECODER)
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
    if graph == VAE_DECODER and name == "sample":
        meaning = "picture in [-1, 1]"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(name, dtype, (batch, *(int(side) for side in tensor.shape[1:])), meaning)


def _size(side: int | str, options: ExportOptions) -> int:
    return options.example_batch if isinstance(side, str) else side


def meta_twin(module: Any) -> Any:
    """A copy without memory, to learn output shapes by running it on nothing."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    memo.update({id(buffer): buffer.to("meta") for buffer in module.buffers()})
    return copy.deepcopy(module, memo)
