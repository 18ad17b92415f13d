"""Integer convolutions and matrix products of an NVIDIA GPU: its int8 matrix units, as `torch._int_mm` gives access to them.

A linear layer is one product. A convolution gathers the windows of its input as bytes (im2col, a quarter of what floats would
take) and is one product, too; a 1x1 convolution gathers nothing. Sums are exact in int32 on every device that has the op.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from tcaq.integer.backend import Backend, Geometry, InputGrid, Span, Weights
from tcaq.integer.trial import try_conv, try_linear

MIDDLE = 128
"""Added to signed codes gives unsigned ones; the op multiplies signed bytes."""
LEAST_ROWS, STEP = 17, 8
"""The op takes at least so many rows, and inner and output sizes that are multiples of 8."""
MOST_ROWS = 2**15
"""At 65 536 rows of 32 codes cuBLAS refuses the product, on an H200; 8 192 it takes."""
CAPABILITY = (7, 5)


def missing() -> str | None:
    """Why nothing can run in integers on this GPU, or None."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if not hasattr(torch, "_int_mm"):
        return f"PyTorch {torch.__version__} has no int8 matrix product"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"{torch.cuda.get_device_name()} has no int8 matrix units"
    return None


class IntegerMatrix:
    """A weight int8 [out, in] as the op wants it, with what it takes to turn sums into floats."""

    def __init__(self, weight: Tensor, weights: Weights) -> None:
        """Args: weight: the codes of `weights` as a matrix."""
        self.out, inner = weight.shape
        self.fill = -inner % STEP
        self.weight = pad(weight, (0, self.fill, 0, -self.out % STEP)).contiguous()
        self.sums = weight.sum(1, dtype=torch.int32)
        self.scale, bias = weights.scale, weights.bias
        self.bias = torch.zeros_like(self.scale) if bias is None else bias

    def __call__(self, codes: Tensor, scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Signed codes int8 [rows, in], which stand for (code - zero_point) * scale; returns `dtype` [rows, out].

        Args: scale, zero_point: numbers, or tensors [rows, 1], the latter int32.
        """
        rows = len(codes)
        short = max(0, LEAST_ROWS - rows)
        if self.fill or short:
            codes = pad(codes, (0, self.fill, 0, short))
        # a transposed input's codes lie by columns, which not every version of the op multiplies
        products = self._products(codes.contiguous())
        sums = products[:rows, : self.out] - zero_point * self.sums
        result: Tensor = torch.addcmul(self.bias, sums.to(self.scale.dtype), self.scale * scale).to(dtype)
        return result

    def _products(self, codes: Tensor) -> Tensor:
        """Codes [rows, in] times the weight, int32 [rows, out], so many rows at a time as the op takes."""
        parts = codes.tensor_split(-(-len(codes) // MOST_ROWS))  # none is shorter than the op takes
        found = [torch._int_mm(part, self.weight.t()) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)


class CudaLinear:
    """A matrix product of uint8 inputs with int8 weights."""

    def __init__(self, weights: Weights) -> None:
        self.matrix = IntegerMatrix(weights.codes, weights)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        codes = signed(grid.codes(x, -1)).reshape(-1, x.shape[-1])
        scale, zero = grid.scale, grid.zero_point
        if isinstance(scale, Tensor):
            scale, zero = scale.reshape(-1, 1), torch.as_tensor(zero).reshape(-1, 1).int()
        return self.matrix(codes, scale, zero - MIDDLE, dtype).reshape(*x.shape[:-1], -1)


class CudaConv:
    """A convolution of uint8 inputs with int8 weights, in one group."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        self.kernel, self.geometry = tuple(weights.codes.shape[2:]), geometry
        self.matrix = IntegerMatrix(weights.codes.permute(0, 2, 3, 1).flatten(1), weights)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, zero = signed(grid.codes(x, 1)), int(grid.zero_point) - MIDDLE
        found = windows(codes.permute(0, 2, 3, 1), self.kernel, self.geometry, zero)
        result = self.matrix(found.flatten(0, 2), float(grid.scale), zero, dtype)
        image: Tensor = result.unflatten(0, found.shape[:3]).permute(0, 3, 1, 2)
        return image


def signed(codes: Tensor) -> Tensor:
    """Unsigned bytes less 128, as signed bytes: their upper bit turned over."""
    return codes.bitwise_xor(MIDDLE).view(torch.int8)


def windows(codes: Tensor, kernel: tuple[int, ...], geometry: Geometry, zero: int) -> Tensor:
    """What each position of a convolution sees.

    Args: codes: int8 [batch, height, width, channels]; zero: the code of the zeros around the image.
    Returns: int8 [batch, height out, width out, kernel height * kernel width * channels].
    """
    (top, side), (down, right) = geometry.padding, geometry.stride
    image = pad(codes, (0, 0, side, side, top, top), value=zero).contiguous()
    batch, rows, columns, channels = image.shape
    reach = [step * (k - 1) for step, k in zip(geometry.dilation, kernel, strict=True)]
    size = (batch, (rows - reach[0] - 1) // down + 1, (columns - reach[1] - 1) // right + 1, *kernel, channels)
    row, column = columns * channels, channels
    steps = (rows * row, down * row, right * column, geometry.dilation[0] * row, geometry.dilation[1] * column, 1)
    return image.as_strided(size, steps).flatten(3)


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Grouped convolutions have no kernel here; others have what a trial on the GPU finds."""
    if geometry.groups > 1:
        return f"a convolution in {geometry.groups} groups has no integer kernel on a GPU"
    return try_conv(CudaConv, shape, geometry, span, _device())


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """What a trial on the GPU finds: sums are exact, but libraries refuse some shapes on some devices."""
    return try_linear(CudaLinear, shape, span, _device())


def _device() -> str:
    """Without a GPU the same arithmetic runs on the CPU, which is how it is tested."""
    return "cuda" if torch.cuda.is_available() else "cpu"


CUDA = Backend(missing, CudaConv, CudaLinear, conv_problem, linear_problem)
