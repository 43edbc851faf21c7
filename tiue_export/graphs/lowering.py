"""Private copies of diffusers' modules, prepared for export: precision, attention, folded time.

A copy shares the student's weights where the dtype allows (no memory is spent), so the student
itself is never changed. What is replaced in the copy: time projections by their constant values,
attention processors by plain ones, gated units by two products; norms, and modules that a caller
names, compute in float32.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tiue_export.proof.half_range import lies_in, outermost
from tiue_export.sampling.plan import Timestep
from tiue_export.student.model import time_embedding

M = TypeVar("M", bound=nn.Module)
ModulePaths = frozenset[str]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NO_PATHS: ModulePaths = frozenset()
_NORMS = (nn.GroupNorm, nn.LayerNorm)


def lowered(module: M, dtype: torch.dtype, float32: ModulePaths = NO_PATHS) -> M:
    """A frozen eval-mode copy in `dtype`; see `in_precision` for what stays in float32."""
    return in_precision(copied(module), dtype, float32)


def copied(module: M, dtype: torch.dtype | None = None, *, plain: bool = True) -> M:
    """A frozen eval-mode copy in `dtype`, or with the very weights of `module` as they are stored.

    With `plain`, upsampling is replaced by its branch-free form and gated units by two products.
    """
    shared: dict[int, Any] = {}
    for parameter in module.parameters():
        weights = parameter.detach() if dtype is None else parameter.detach().to(dtype)
        shared[id(parameter)] = nn.Parameter(weights, requires_grad=False)
    for buffer in module.buffers():
        keep = dtype is None or not buffer.is_floating_point()
        shared[id(buffer)] = buffer if keep else buffer.to(dtype)
    # deepcopy takes whatever the memo holds instead of copying it: the weights stay shared.
    twin = copy.deepcopy(module, shared).eval()
    return with_split_gates(with_plain_upsampling(twin)) if plain else twin


def in_precision(
    module: M,
    dtype: torch.dtype,
    float32: ModulePaths = NO_PATHS,
    *,
    border: torch.dtype | None = None,
) -> M:
    """Give `module` (changed in place) weights in `dtype`; returns it.

    In half precision every norm and every submodule whose path is in `float32` ("" is `module`)
    computes in float32, weights included, and returns `dtype`; `border` replaces that for `module`
    itself.
    """
    half = dtype.itemsize < torch.float32.itemsize
    islands = outermost(float32) if half else NO_PATHS
    cast_once: dict[tuple[int, torch.dtype], Tensor] = {}
    for path, child in list(module.named_modules()):
        inside = lies_in(path, islands)
        norm = half and not inside and isinstance(child, _NORMS)
        _set_weights(child, torch.float32 if inside or norm else dtype, cast_once)
        if path in islands or norm:
            compute_in_float32(child, dtype if path or border is None else border)
    return module


def _set_weights(
    module: nn.Module, dtype: torch.dtype, cast_once: dict[tuple[int, torch.dtype], Tensor]
) -> None:
    """Cast the module's own parameters and buffers; a tensor in two places stays one tensor."""
    for name, old in module.named_parameters(recurse=False):
        key = id(old), dtype
        if key not in cast_once:
            cast_once[key] = nn.Parameter(old.detach().to(dtype), requires_grad=False)
        setattr(module, name, cast_once[key])
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            setattr(module, name, buffer.to(dtype))


def below(paths: ModulePaths, prefix: str) -> ModulePaths:
    """The paths that lie in the submodule `prefix`, as that submodule sees them."""
    inside = {path for path in paths if lies_in(path, [prefix])}
    return frozenset(path[len(prefix) :].removeprefix(".") for path in inside)


class InFloat32(nn.Module):
    """Mixed into a module's class: it computes in float32 and returns `float32_border`'s dtypes.

    One dtype for all outputs, or one per output of a tuple.
    """

    float32_border: torch.dtype | Sequence[torch.dtype]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(_widened, (args, kwargs))
        outputs = super().forward(*args, **kwargs)
        border = self.float32_border
        if isinstance(border, torch.dtype):
            return tree_map(functools.partial(_rounded, dtype=border), outputs)
        return tuple(_rounded(x, dtype=kind) for x, kind in zip(outputs, border, strict=True))


def compute_in_float32(module: M, border: torch.dtype | Sequence[torch.dtype]) -> M:
    """Make a module whose weights are float32 cast at its borders; returns it.

    The module's class is extended, as torch.nn.utils.parametrize does: a wrapper module would hide
    attributes that diffusers reads, and its name would stand in every path of the exported graph.
    """
    extended: Any = module
    kind: Any = type(module)
    extended.__class__ = _in_float32(kind)
    extended.float32_border = border
    return module


@functools.cache
def _in_float32(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"InFloat32{kind.__name__}", (InFloat32, kind), {})


def _widened(value: Any) -> Any:
    return value.float() if _is_float(value) else value


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class Attention:
    """Attention processor (diffusers' extension point) for self-attention and text attention.

    Without masks, added projections or rescaling, which Stable Diffusion's attentions lack. With
    `upcast`, scores and softmax are computed in float32 (`upcast_attention` of SD 2.x).
    """

    def __init__(self, upcast: bool) -> None:
        # An attribute, so that a backend can put another form of the same mathematics in place.
        self.attend: Attend = functools.partial(attend, upcast=upcast)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **ignored: object,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key = split_heads(attn.to_k(context), attn.heads)
        value = split_heads(attn.to_v(context), attn.heads)
        mixed = self.attend(query, key, value)  # (N, heads, T, d)
        return project_out(attn, mixed.transpose(1, 2).flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, heads * d) -> (N, heads, T, d)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, upcast: bool) -> Tensor:
    """Scaled dot-product attention over (N, heads, T, d); in float32 if `upcast`."""
    if not upcast or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(query, key, value)
    mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return mixed.to(query.dtype)


def project_out(attn: Any, x: Tensor) -> Tensor:
    """The output projection of a diffusers Attention; its dropout is inactive in eval mode."""
    y: Tensor = attn.to_out[0](x)
    return y


def with_plain_attention(module: M, upcast: bool) -> M:
    """Set the plain processor on every diffusers Attention below `module`."""
    processor = Attention(upcast)
    for child in module.modules():
        if isinstance(child, DiffusersAttention):
            child.set_processor(processor)
    return module


def is_single(x: Tensor) -> bool:
    """Whether the batch is a static 1: then rows broadcast in four dimensions, without reshapes."""
    return isinstance(x.shape[0], int) and x.shape[0] == 1


def time_embedding_float64(unet: Any, timesteps: tuple[Timestep, ...]) -> Tensor:
    """Time embeddings (K, D_t) in float64 whatever the UNet's dtype.

    What is folded must not depend on where the weights lie in memory: float32 products differ in
    their last bit between a memory-mapped file and another, and the graphs would differ with them.
    """
    stem = nn.ModuleDict({"conv_in": unet.conv_in, "time_embedding": unet.time_embedding})
    twin = lowered(stem, torch.float64)
    twin.add_module("time_proj", unet.time_proj)
    with torch.no_grad():
        return time_embedding(twin, timesteps)


def time_bias(resnet: Any, embedding: Tensor) -> Tensor:
    """What a resnet adds for each timestep: (K, D_t) float64 -> (K, C) float32."""
    projection = resnet.time_emb_proj
    with torch.no_grad():
        active = resnet.nonlinearity(embedding)
        return F.linear(active, projection.weight.double(), projection.bias.double()).float()


def fold_time(module: M, embedding: Tensor) -> M:
    """Replace each resnet's time projection below `module` by its values at the fixed timesteps.

    They are float32: `in_precision` rounds them with the weights, once.
    """
    resnet: Any
    for resnet in module.modules():
        if getattr(resnet, "time_emb_proj", None) is not None:
            resnet.time_emb_proj = FoldedTime(time_bias(resnet, embedding))
    return module


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution: diffusers' Upsample2D without its branches on
    the batch size, which torch.export would turn into a limit of 15 images."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        doubled = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        convolved: Tensor = self.conv(doubled)
        return convolved


def with_plain_upsampling(module: M) -> M:
    """Replace every diffusers Upsample2D below `module`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, Upsample2D):
                setattr(parent, name, Upsample(child.conv))
    return module


class SplitGate(nn.Module):
    """x (N, T, C) -> value(x) * gelu(gate(x)) (N, T, 4C): diffusers' GEGLU with its product cut in
    two. The same sums in the same order; both layers are views of the one weight.

    No runtime then has to cut a tensor of 8C channels, which OpenVINO does in a reference kernel.
    """

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        self.value, self.gate = _output_halves(geglu.proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated: Tensor = self.value(hidden_states) * F.gelu(self.gate(hidden_states))
        return gated


def _output_halves(linear: nn.Linear) -> list[nn.Linear]:
    """The layers that give the first and the second half of a linear layer's outputs."""
    half = linear.out_features // 2
    layers = []
    for part in (slice(None, half), slice(half, None)):
        with torch.device("meta"):
            layer = nn.Linear(linear.in_features, half, bias=False)
        layer.weight = nn.Parameter(linear.weight.detach()[part], requires_grad=False)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach()[part], requires_grad=False)
        layers.append(layer)
    return layers


def with_split_gates(module: M) -> M:
    """Replace every diffusers GEGLU below `module`."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, GEGLU):
                setattr(parent, name, SplitGate(child))
    return module


class FoldedTime(nn.Module):
    """Stands where a resnet's time projection was: constants (K, C) spread over K*B rows."""

    bias: Tensor

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, rows: Tensor) -> Tensor:
        steps, channels = self.bias.shape
        spread = self.bias.unsqueeze(1).expand(steps, rows.shape[0] // steps, channels)
        return spread.reshape(-1, channels)  # (K*B, C)
