"""Integer convolutions and matrix products of an NVIDIA GPU by programs of our own, which Triton compiles; see cuda_kernels.py.

Beside what `cuda.py` does with PyTorch's operations: inputs become codes in one pass, no windows are gathered, and scale, bias and
the output's dtype are part of the product. Needs Triton, which PyTorch brings along where it is built for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tcaq.integer.backend import Backend, Geometry, InputGrid, Span, Weights
from tcaq.integer.trial import too_long, try_conv, try_linear

CAPABILITY = (8, 0)
"""Triton compiles no int8 product for older ones."""
MIDDLE = 128
READ = (torch.float32, torch.float16, torch.bfloat16)
"""What inputs are read as; others are converted before."""
CODED = 64
"""A program turns so many pixels of so many channels into codes."""


def missing() -> str | None:
    """Why Triton's programs cannot run on this GPU, or None."""
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return f"Triton has no int8 product for {torch.cuda.get_device_name()}"
    return None


@dataclass(frozen=True)
class Pixels:
    """How images lie in memory. Attributes: strides: elements from image to image, pixel to pixel, channel to channel."""

    images: int
    height: int
    width: int
    strides: tuple[int, int, int]

    @property
    def each(self) -> int:
        """Pixels of an image."""
        return self.height * self.width

    @property
    def total(self) -> int:
        """Pixels of all images."""
        return self.images * self.each


class TritonMatrix:
    """A weight as the program reads it, [out, taps, channels] with channels filled up to whole blocks, and its products."""

    def __init__(self, codes: Tensor, weights: Weights) -> None:
        """Args: codes: those of `weights`, int8 [out, taps, channels]."""
        self.out, self.taps, self.channels = codes.shape
        self.filled, self.block = _filled(self.channels)
        self.packed = pad(codes, (0, self.filled - self.channels)).contiguous()
        self.scale, self.bias, self.rest = weights.scale, weights.bias, weights.rest
        self.sums = codes.sum((1, 2), dtype=torch.int32)
        self._chosen: dict[tuple[int, torch.dtype], dict[str, Any]] = {}
        if weights.rest is not None:
            # what fills up has the zero point's code, so each channel's rest meets as many zero points as codes
            self.sums += weights.rest * (self.taps * self.filled)

    def encode(self, x: Tensor, given: Pixels, grid: InputGrid, top: int = 0, side: int = 0) -> Tensor:
        """Codes less 128, int8 [images, top + height + top, side + width + side, filled], with zero points all around.

        Args: x: of a dtype in READ.
        """
        from tcaq.integer import cuda_kernels

        size = (given.images, given.height + 2 * top, given.width + 2 * side, self.filled)
        codes = torch.empty(size, dtype=torch.int8, device=x.device)
        around = codes.numel() // self.filled - given.total
        blocks = (-(-given.total // CODED) - (-around // CODED), -(-self.filled // CODED))
        with torch.cuda.device_of(x):
            cuda_kernels.encode[blocks](
                x, codes, grid.equalizer.float(), grid.scale, grid.zero_point, grid.top,
                given.total, given.images, given.each, given.width, self.channels, *given.strides,
                *size[1:], top, side, isinstance(grid.scale, Tensor), CODED, CODED,
            )  # fmt: skip
        return codes

    def multiply(
        self, codes: Tensor, grid: InputGrid, result: Tensor, put: Pixels, kernel: int, geometry: Geometry
    ) -> None:
        """Write `result`, which lies as `put` says.

        Args: codes: as `encode` makes them; kernel: width of the kernel.
        """
        from tcaq.integer import cuda_kernels

        row, pixel = codes.stride(1), codes.stride(2)
        (down, right), (step_down, step_right) = geometry.stride, geometry.dilation
        arguments = (
            codes, self.packed, self.sums, self.scale, self.bias, self.rest, result, grid.scale, grid.zero_point,
            put.total, put.each, put.width, self.out, codes.stride(0), down * row, right * pixel, self.filled,
            step_down * row, step_right * pixel, kernel, self.taps, *put.strides,
        )  # fmt: skip
        meta = {
            "HAS_BIAS": self.bias is not None, "HAS_REST": self.rest is not None, "BY_PIXEL": isinstance(grid.scale, Tensor),
            "BLOCK_K": self.block,
        }  # fmt: skip
        size = put.total.bit_length()
        with torch.cuda.device_of(codes):
            if (chosen := self._chosen.get((size, result.dtype))) is None:
                # Triton's own way to the choice it remembers takes as long as all the rest of a call
                self._chosen[size, result.dtype] = cuda_kernels.choose(*arguments, size, **meta)
            else:
                blocks = cuda_kernels.blocks(put.total, self.out, chosen)
                cuda_kernels.multiply[(blocks,)](*arguments, size, **meta, **chosen)


class TritonConv:
    """A convolution of a float input, turned to codes, with int8 weights, in one group."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        self.kernel, self.geometry = tuple(weights.codes.shape[2:]), geometry
        self.matrix = TritonMatrix(weights.codes.flatten(2).transpose(1, 2), weights)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]; the output lies in memory as the input does."""
        x, last = _dense(_readable(x))
        images, channels, height, width = x.shape
        given = Pixels(images, height, width, _strides(channels, height * width, last))
        codes = self.matrix.encode(x, given, grid, *self.geometry.padding)
        sides = zip(codes.shape[1:3], self.kernel, self.geometry.stride, self.geometry.dilation, strict=True)
        out, (height, width) = self.matrix.out, [(s - step * (k - 1) - 1) // by + 1 for s, k, by, step in sides]
        form = torch.channels_last if last else torch.contiguous_format
        result = torch.empty((images, out, height, width), dtype=dtype, device=x.device, memory_format=form)
        put = Pixels(images, height, width, _strides(out, height * width, last))
        self.matrix.multiply(codes, grid, result, put, self.kernel[1], self.geometry)
        return result


class TritonLinear:
    """A matrix product of a float input, turned to codes, with int8 weights: a convolution over images of one column."""

    def __init__(self, weights: Weights) -> None:
        self.matrix = TritonMatrix(weights.codes.unsqueeze(1), weights)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        shape, out, x = x.shape[:-1], self.matrix.out, _readable(x)
        if x.dim() != 3 or x.is_contiguous():
            x = x.reshape(1, -1, x.shape[-1])
        images, rows, _ = x.shape
        if isinstance(grid.scale, Tensor):
            scale, zero = (torch.as_tensor(part).float().contiguous() for part in (grid.scale, grid.zero_point))
            grid = InputGrid(scale, zero, grid.equalizer, grid.top)
        result = torch.empty((images, rows, out), dtype=dtype, device=x.device)
        by_image, by_row, by_feature = x.stride()
        codes = self.matrix.encode(x, Pixels(images, rows, 1, (by_image, by_row, by_feature)), grid)
        self.matrix.multiply(codes, grid, result, Pixels(images, rows, 1, (rows * out, out, 1)), 1, Geometry())
        return result.reshape(*shape, out)


def _filled(channels: int) -> tuple[int, int]:
    """So many channels make whole blocks, and how long those are: what one step of the program multiplies."""
    filled = 32 if channels <= 32 else -(-channels // 64) * 64
    return filled, next(block for block in (128, 64, 32) if filled % block == 0)


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in READ else x.float()


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """The image without gaps, and whether its channels lie beside each other."""
    if x.is_contiguous():
        return x, False
    return (x, True) if x.is_contiguous(memory_format=torch.channels_last) else (x.contiguous(), False)


def _strides(channels: int, pixels: int, last: bool) -> tuple[int, int, int]:
    return (pixels * channels, channels, 1) if last else (pixels * channels, 1, pixels)


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Grouped convolutions have no kernel here; others have what a trial on the GPU finds."""
    if geometry.groups > 1:
        return f"a convolution in {geometry.groups} groups has no integer kernel on a GPU"
    return too_long(shape) or _tried(lambda: try_conv(TritonConv, shape, geometry, span, _device()))


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """What a trial on the GPU finds."""
    return too_long(shape) or _tried(lambda: try_linear(TritonLinear, shape, span, _device()))


def _tried(trial: Callable[[], str | None]) -> str | None:
    from triton.errors import TritonError

    try:
        return trial()
    except TritonError as error:
        return f"Triton cannot compile its product: {error}"


def _device() -> str:
    """Without a GPU, Triton's interpreter runs the same programs on the CPU, which is how they are tested."""
    return "cuda" if torch.cuda.is_available() else "cpu"


TRITON = Backend(missing, TritonConv, TritonLinear, conv_problem, linear_problem, adds_rest=True)
