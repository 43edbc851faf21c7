"""Nearest-neighbour doubling and a 3x3 convolution as four 2x2 convolutions. Exact.

Each pixel that is doubled is read by the kernel up to twice a side. What falls on the same pixel is
one product with the sum of its weights: an output pixel of even row and even column is a 2x2
convolution of the smaller picture, and so, with other sums, are the three other kinds. 16 products
stand where 36 were, for 16/9 as many weights (Shi et al., "Is the deconvolution layer the same as a
convolutional layer?", 2016, tells the like of sub-pixel and transposed convolutions).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiue_export.graphs.lowering import M, Upsample, copied

_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # an output pixel's row and column, modulo 2


class SubPixelConvolution(nn.Module):
    """x (N, C, H, W) -> the 3x3 convolution, padded by 1, of x doubled: (N, O, 2H, 2W).

    The weights of the four phases, (O, C, 2, 2) each, are summed in float64 and kept in float32, as
    sums of two halves are no halves; `lowering.in_precision` rounds them with all others.
    """

    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        for row, column in _PHASES:
            weight = _summed(_summed(conv.weight.detach().double(), 2, row), 3, column)
            parameter = nn.Parameter(weight.float(), requires_grad=False)
            setattr(self, f"weight_{row}{column}", parameter)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        phases = [self._phase(x, row, column) for row, column in _PHASES]
        # (N, O, 4, H, W) -> (N, 4 * O, H, W) -> (N, O, 2H, 2W)
        return F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)

    def _phase(self, x: Tensor, row: int, column: int) -> Tensor:
        weight: Tensor = getattr(self, f"weight_{row}{column}")
        if x.shape[2:] == (2, 2):
            # onnxruntime-web 1.30's WebGPU takes a kernel as large as its picture, with no padding
            # before it, for a matrix product, whatever is padded behind: a third of the values of
            # phase 1, 1 were wrong (tests/apps/test_web_browser.py).
            padded = F.conv2d(x, weight, self.bias, padding=1)  # (N, O, 3, 3)
            return padded[:, :, row : row + 2, column : column + 2]
        padded = F.pad(x, (1 - column, column, 1 - row, row))
        return F.conv2d(padded, weight, self.bias)


def _summed(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Three weights along an axis -> two: of even outputs the last two meet one pixel, of odd ones
    the first two."""
    first, middle, last = weight.unbind(axis)
    pair = (first + middle, last) if phase else (first, middle + last)
    return torch.stack(pair, axis)


class SubPixelUpsample(nn.Module):
    """In the place of a diffusers Upsample2D; its convolution keeps its path."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = SubPixelConvolution(conv)

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        convolved: Tensor = self.conv(hidden_states)
        return convolved


def with_subpixel_upsampling(module: M) -> M:
    """A copy of a UNet or VAE that shares all weights but those of its upsampling layers.

    Layers of another kind (other kernels, no convolution at all) stay as they are.
    """
    twin = copied(module)
    for parent in twin.modules():
        children: list[tuple[str, Any]] = list(parent.named_children())
        for name, child in children:
            if isinstance(child, Upsample) and _is_usual(child.conv):
                setattr(parent, name, SubPixelUpsample(child.conv))
        if isinstance(parent, nn.Sequential):  # the tiny VAE's layers
            for (name, child), (follower, conv) in pairwise(children):
                if isinstance(child, nn.Upsample) and _doubles(child) and _is_usual(conv):
                    setattr(parent, name, nn.Identity())
                    setattr(parent, follower, SubPixelConvolution(conv))
    return twin


def _doubles(layer: nn.Upsample) -> bool:
    return layer.mode == "nearest" and layer.scale_factor in (2, (2.0, 2.0))


def _is_usual(conv: Any) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is a 3x3 convolution of all channels, padded by 1 with zeros."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )
