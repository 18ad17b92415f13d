"""A convolution's windows as rows of a matrix.

ONNX Runtime multiplies matrices of bytes by constant ones at the speed of its convolutions whose outputs are bytes, too;
`ConvInteger`, which gives whole sums, takes twice as long. Gathering the windows, of as many bytes as they have, costs a tenth.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tcaq.export.operator import operator
from tcaq.export.standin import Steps

PART = 2**18
"""Bytes of an image's windows, as large as it is in the trace, that are gathered at once: a batch of them stays in the cache."""


@dataclass(frozen=True)
class Windows:
    """Rows, and how to make images of what comes of them.

    Attributes: rows: [batch, places, window * in], in parts, each of which is used before the next is gathered; shape: int64 [4],
        of images, 0 for a size that stays; size: their height and width in the trace.
    """

    rows: tuple[Tensor, ...]
    shape: Tensor
    size: tuple[int, int]

    def images(self, products: Tensor) -> Tensor:
        """Float [batch, places, out] as [batch, out, height, width]."""
        like = torch.empty(products.shape[0], products.shape[2], *self.size)
        return operator("Reshape", products.dtype, (products.transpose(1, 2), self.shape), like)


def windows(codes: Tensor, zero: Tensor, layer: nn.Conv2d, steps: Steps) -> Windows:
    """Gather what a kernel sees at each place.

    Args: codes: [batch, in, height, width]; zero: their zero point, [1], which stands outside the image.
    """
    down, right = (int(cast(int, edge)) for edge in layer.padding)
    size, channels = tuple(int(side) for side in codes.shape[2:]), int(codes.shape[1])
    rows = codes.permute(0, 2, 3, 1)
    if down or right:
        like = pad(rows, (0, 0, right, right, down, down))
        rows = operator("Pad", codes.dtype, (rows, torch.tensor([0, down, right, 0] * 2), zero), like)
    key = size, layer.kernel_size, layer.stride, layer.padding, layer.dilation
    if key not in steps.once:  # layers at one level of a denoiser look at the same places
        steps.once[key] = _places(rows, layer)
    index, shape, found = steps.once[key]
    width = channels * layer.kernel_size[0] * layer.kernel_size[1]
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1):
        return Windows((_reshaped(rows, width),), shape, found)
    parts = _parts(index, width // channels, max(1, round(found[0] * found[1] * width / PART)))
    rows = _reshaped(rows, channels)
    return Windows(tuple(_reshaped(rows.index_select(1, part), width) for part in parts), shape, found)


def _parts(index: Tensor, window: int, count: int) -> tuple[Tensor, ...]:
    """An index in parts of whole windows."""
    if count == 1:
        return (index,)
    places = index.shape[0] // window
    ends = [places * part // count * window for part in range(count + 1)]
    return tuple(index[begin:end] for begin, end in itertools.pairwise(ends))


def _places(padded: Tensor, layer: nn.Conv2d) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Where a window's codes lie among those of an image, int64 [places * window], and the two parts of `Windows` that follow."""
    first, within = [], []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        first.append(torch.arange(0, padded.shape[1 + axis] - reach, layer.stride[axis]))
        within.append(torch.arange(layer.kernel_size[axis]) * layer.dilation[axis])
    rows = first[0].reshape(-1, 1, 1, 1) + within[0].reshape(-1, 1)
    index = rows * padded.shape[2] + (first[1].reshape(-1, 1, 1) + within[1])
    sizes = [torch._shape_as_tensor(along) for along in first]
    return index.reshape(-1), torch.cat([torch.zeros(2, dtype=torch.int64), *sizes]), (len(first[0]), len(first[1]))


def _reshaped(rows: Tensor, width: int) -> Tensor:
    """Codes [batch, ...] as [batch, rows, width]."""
    like = rows.reshape(rows.shape[0], -1, width)
    return operator("Reshape", rows.dtype, (rows, torch.tensor([0, -1, width])), like)
