"""The fp32 student run on real prompts: what every exported graph is held against.

Each graph gets its feeds from the graph before it, so all inputs are captured, none invented. The
parts are run and freed one after the other: at full size they would not fit side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tiue_export.bundle.chain import (
    LATENT_PARAMETERS,
    LATENTS,
    PROMPT_TEXT,
    SCALED_LATENTS,
    SOURCE_PICTURE,
    TEXT,
    TOKENS,
    chain_of,
    scaled_latents,
)
from tiue_export.bundle.manifest import ParityRecord
from tiue_export.drawing.tokenizer import Tokenizer
from tiue_export.drawing.vae_tiles import decode_in_tiles, first_tile, is_tiled, tile_size
from tiue_export.errors import ParityError
from tiue_export.graphs.build import Graph, build_graphs, exported_plan, gaussian_text, run_graph
from tiue_export.graphs.lowering import copied
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.parity import (
    PROMPTS,
    Reference,
    parity_record,
    reference_prompts,
    with_dtypes,
)
from tiue_export.reference.fan_out_loss import fan_out_record
from tiue_export.reference.half_audit import HALVES, RangeRecorder, float32_options, score_blocks
from tiue_export.reference.loop_capture import GraphIO, capture_loop, hops_of_diffusers
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.sampler import OnStep
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_GRAPHS,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
)
from tiue_export.student.model import Student, combine, text_embedding


@dataclass(frozen=True)
class Capture:
    """The stored reference, every graph's (feeds, outputs) in float32, and the torch-side hops."""

    reference: Reference
    graph_io: Mapping[str, GraphIO]
    hops: list[ParityRecord]


def capture(
    student: Student,
    options: ExportOptions,
    tokenizer: Tokenizer | None,
    recorder: RangeRecorder | None = None,
    on_step: OnStep = lambda done, total: None,
) -> Capture:
    """Run the student in float32 on PROMPTS and seeds 0, 1, ...; measure every torch-side hop.

    `recorder` watches the graphs run: an overflow audit that costs no run of its own. `on_step`
    hears of the steps of a model in a loop.
    """
    options = float32_options(options)
    recorder = recorder or RangeRecorder(student, options, only=())
    noises = noises_from_seed(0, student.plan.noises, shapes_of(student, options).latents)
    run = _Run(student, options, recorder, {"sample": noises[0]})
    inputs = run.text(tokenizer)
    if student.plan.one_pass:
        run.unet(inputs, tokenizer)
    else:
        run.known["sample"] = noises
        control = None if student.controlnet is None else copied_unet(student.controlnet)
        wide = student.of_parts(unet=copied_unet(student.unet), controlnet=control)
        run.hops.extend(
            capture_loop(wide, options, run.known, run.graph_io, inputs, recorder, on_step)
        )
    factor = shapes_of(student, options).vae_scaling_factor
    run.known[SCALED_LATENTS] = scaled_latents(run.known[LATENTS], factor)
    run.vae(inputs)
    return Capture(Reference(run.known, inputs), run.graph_io, run.hops)


@dataclass(frozen=True)
class _Run:
    """A student's parts run one after the other; each adds what later ones and the bundle need."""

    student: Student
    options: ExportOptions
    recorder: RangeRecorder
    known: dict[str, Array]
    graph_io: dict[str, GraphIO] = field(default_factory=dict)
    hops: list[ParityRecord] = field(default_factory=list)

    def text(self, tokenizer: Tokenizer | None) -> str:
        """The text embedding; what the reference's inputs are, in words."""
        student, known = self.student, self.known
        batch, *rest = shapes_of(student, self.options).text
        if student.text_encoder is None or tokenizer is None:
            rows = student.plan.copies * batch
            known["encoder_hidden_states"] = gaussian_text((rows, rest[0], rest[1]))
            return "Gaussian text embedding (the checkpoint has no text encoder), seeded noise"
        known["input_ids"] = tokenizer(reference_prompts(batch, tokenizer.chunks))
        part = student.of_parts(text_encoder=student.text_encoder)
        (graph,) = build_graphs(part, self.options, only=(TEXT_ENCODER,))
        outputs = self._watched(graph, known)
        known.update(chain_of(student.plan).values(TEXT_ENCODER, outputs))
        if not student.plan.one_pass:
            known[TEXT] = known[PROMPT_TEXT]
        if student.plan.guidance is not None:
            _, empty = run_graph(graph, {TOKENS: tokenizer([""] * batch)})
            halves = [*empty.values(), known[PROMPT_TEXT]]
            known[TEXT] = np.concatenate(halves)  # (2B, L, D)
        inputs = f"{min(batch, len(PROMPTS))} real prompt(s), seeded noise"
        own = copied(student.text_encoder, torch.float32, plain=False)
        with torch.no_grad():
            plain = text_embedding(own, torch.from_numpy(known["input_ids"]))
        self.hops.append(_lowered(TEXT_ENCODER, plain, outputs["last_hidden_state"], inputs))
        return inputs

    def unet(self, inputs: str, tokenizer: Tokenizer | None) -> None:
        """The UNet of a plan of one pass, its graphs held against it and against the DDIM loop."""
        student, known = self.student, self.known
        wide = student.of_parts(unet=copied_unet(student.unet))
        noise = torch.from_numpy(known["sample"])
        text = torch.from_numpy(known["encoder_hidden_states"])
        with torch.no_grad():
            scaled = wide.plan.passes[0].input.noise * noise
            unsplit = wide.unet(scaled, wide.plan.timesteps[0], text).sample
            outputs = wide.decode(wide.encode(noise, text), text)
            latents = _np(wide.combine(noise, outputs))
        by_step = outputs.reshape(student.plan.rows, *noise.shape)
        self._hold("split", "row 0 / unsplit UNet", _np(unsplit), _np(by_step[0]), inputs)
        arrays = known["sample"][None], known["encoder_hidden_states"], _np(by_step)
        self.hops.extend(hops_of_diffusers(wide, *arrays, latents, inputs))
        plan, merged = (
            exported_plan(student, self.options),
            student.plan.merged(self.options.merge_below),
        )
        pool = dict(known)
        for graph in build_graphs(wide, self.options, only=UNET_GRAPHS):
            pool.update(self._watched(graph, pool))
        # The exported rows of the naive student: with merging, the same rows and weights.
        kept = [k for k, t in enumerate(student.plan.timesteps) if t in merged.timesteps]
        own = expected = _np(combine(merged.latents, noise, by_step[kept].flatten(0, 1)))
        if plan.fan_out != student.plan.fan_out:
            with torch.no_grad():
                expected = _np(wide.by_plan(plan).sample(noise, text))
        hop = "lowered" if self.options.hoist == "none" else "hoisted"
        value = known[LATENTS] = self.graph_io[UNET_DECODER][1]["latents"]
        self._hold(hop, "latents / naive student", expected, value, inputs)
        if merged.rows < student.plan.rows:
            hop = f"merged t={','.join(map(str, merged.merged_timesteps))}"
            self._hold(hop, "latents / all rows", latents, own, inputs, kind=None)
        if plan.fan_out != student.plan.fan_out:
            self.hops.append(fan_out_record(student, self.options, tokenizer))

    def vae(self, inputs: str) -> None:
        """The VAE decoder on the latents, or on their first tile."""
        student, known = self.student, self.known
        if student.vae is None:
            return
        part = student.of_parts(vae=student.vae)
        (graph,) = build_graphs(part, self.options, only=(VAE_DECODER,))
        whole, size = known["latent_sample"], tile_size(graph.spec)
        known["latent_sample"] = first_tile(whole, size)
        known["picture"] = self._watched(graph, known)["sample"]
        own = copied(student.vae, torch.float32, plain=False)
        with torch.no_grad():
            plain = own.decode(torch.from_numpy(known["latent_sample"])).sample
        self.hops.append(_lowered(VAE_DECODER, plain, known["picture"], inputs))
        picture = known["picture"]
        if is_tiled(graph.spec, whole):
            self.hops.append(_tiled(graph, own, whole, inputs))
            with torch.no_grad():
                picture = _np(own.decode(torch.from_numpy(whole)).sample)
        if self.options.with_vae_encoder:
            self._vae_encoder(student.vae, np.clip(picture, -1, 1), inputs)

    def _vae_encoder(self, vae: Any, picture: Array, inputs: str) -> None:
        """The VAE's encoder on the picture that was drawn."""
        part, known = self.student.of_parts(vae=vae), self.known
        (graph,) = build_graphs(part, self.options, only=(VAE_ENCODER,))
        known[SOURCE_PICTURE] = picture
        (value,) = self._watched(graph, {"sample": picture}).values()
        known[LATENT_PARAMETERS] = value
        own = copied(vae, torch.float32, plain=False)
        with torch.no_grad():
            (encoded,) = own.encode(torch.from_numpy(picture), return_dict=False)
        plain = getattr(encoded, "parameters", encoded)
        self.hops.append(_lowered(VAE_ENCODER, plain, value, inputs))

    def _watched(self, graph: Graph, pool: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph, recorded; its outputs."""
        with self.recorder.watching(graph):
            feeds, outputs = run_graph(graph, pool)
        self.graph_io[graph.spec.name] = feeds, outputs
        return outputs

    def _hold(
        self,
        hop: str,
        subject: str,
        expected: Array,
        value: Array,
        inputs: str,
        kind: str | None = "split",
    ) -> None:
        self.hops.append(parity_record(hop, subject, expected, value, kind, inputs))


def _tiled(graph: Graph, own: Any, latents: Array, inputs: str) -> ParityRecord:
    """The picture made of tiles against the one decoded whole; no gate: it is a choice."""

    def decode(tile: Array) -> Array:
        return run_graph(graph, {"latent_sample": tile})[1]["sample"]

    size = tile_size(graph.spec)
    with torch.no_grad():
        whole = _np(own.decode(torch.from_numpy(latents)).sample)
    scale = whole.shape[2] // latents.shape[2]
    hop = f"tiled {size[1] * scale}x{size[0] * scale} px"
    value = decode_in_tiles(decode, latents, size)
    return parity_record(hop, "picture / whole decode", whole, value, None, inputs)


def _lowered(graph: str, plain: Tensor, value: Array, inputs: str) -> ParityRecord:
    """The module prepared for export against the checkpoint's own."""
    return parity_record("lowered", f"{graph} / its own module", _np(plain), value, "split", inputs)


def measure_half_arithmetic(
    graph: Graph, feeds: Mapping[str, Array], expected: Mapping[str, Array], inputs: str
) -> ParityRecord:
    """Run an fp16 or bf16 graph in torch under `HalfArithmetic`; its worst output's record.

    Raises `ParityError` when a value leaves half precision's range.
    """
    typed = with_dtypes(graph.spec, feeds)
    with torch.no_grad(), HalfArithmetic():
        outputs = graph.module(*(torch.from_numpy(array) for array in typed.values()))
    records = []
    for spec, output in zip(graph.spec.outputs, outputs, strict=True):
        value = _np(output)
        if not np.isfinite(value).all():
            raise ParityError(
                f'{graph.spec.name} overflows half precision (65504): output "{spec.name}" holds '
                f"{int(value.size - np.isfinite(value).sum())} non-finite values",
                "An audit (on unless --no-audit) keeps such values in float32, and --audit-prompts "
                "widens it; or export in fp32.",
            )
        hop, kind = f"{graph.precision} arithmetic", graph.precision
        reference = expected[spec.name]
        records.append(parity_record(hop, graph.spec.name, reference, value, kind, inputs))
    return min(records, key=lambda record: record.value)


class HalfArithmetic(TorchFunctionMode):
    """Half precision as tensor cores do it: products summed in float32, every result rounded.

    For fp16 and bf16; modules that compute in float32 are left alone.

    The heavy operations are computed in float32 on half-precision operands and their results
    rounded to half, attention as the products and the softmax that an ONNX graph spells out: its
    scores can overflow. All others run in half as they are. torch's own half convolutions on a CPU
    round alike but take 80 times as long (184 s for an SD 2.1 encoder).
    """

    _HEAVY: ClassVar = (
        torch.conv2d,
        F.linear,
        F.interpolate,
        F.silu,
        F.gelu,
    )

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        attention = function is F.scaled_dot_product_attention
        if not (attention or function in self._HEAVY) or args[0].dtype not in HALVES:
            return function(*args, **kwargs)
        if attention:
            return half_attention(*args, **kwargs)
        wide = [_wide(argument) for argument in args]
        result = function(*wide, **{k: _wide(v) for k, v in kwargs.items()})
        return result.to(args[0].dtype)


def half_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention over (..., T, d) and (..., S, d) with scores and probabilities rounded to half.

    Query and key are scaled before their product, each by the root, as torch exports it to ONNX.
    Computed in blocks of rows: at full size the scores of one layer take gigabytes.
    """
    dtype, root = query.dtype, (scale or query.shape[-1] ** -0.5) ** 0.5
    length, keys = query.shape[-2], key.shape[-2]
    if is_causal:
        attn_mask = torch.ones(length, keys, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], keys).flatten(0, -3)  # (N, T, S)
    wide_query, wide_key = ((x * root).float().flatten(0, -3) for x in (query, key))
    wide_value, mixed = value.float().flatten(0, -3), torch.empty_like(query).flatten(0, -3)
    for n, t in score_blocks(len(wide_query), length, keys):
        scores = (wide_query[n, t] @ wide_key[n].transpose(1, 2)).to(dtype)
        if attn_mask is not None:
            scores = scores + attn_mask[n, t].to(dtype)
        weights = scores.float().softmax(-1).to(dtype)
        mixed[n, t] = (weights.float() @ wide_value[n]).to(dtype)
    return mixed.view(query.shape)


def _wide(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) else argument


def copied_unet(unet: Any) -> Any:
    """The UNet in float32; weights that are float32 already are shared."""
    # The plain diffusers modules are wanted here, with their own attention and upsampling.
    return unet if unet.dtype == torch.float32 else copied(unet, torch.float32, plain=False)


def _np(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().numpy()
    return array
