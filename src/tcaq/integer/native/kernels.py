"""oneDNN's integer products of the CPU with compiled C around them."""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from tcaq.integer import cpu
from tcaq.integer.backend import Backend, Geometry, InputGrid, Span, Weights
from tcaq.integer.native.compiler import absent
from tcaq.integer.native.library import FusesNorm, native_glue
from tcaq.integer.trial import try_conv, try_linear, try_product


def missing() -> str | None:
    """Why there are no integer products here at all, or nothing that is compiled around them; else None."""
    return cpu.missing() or absent(native_glue)


class CompiledConv(FusesNorm, cpu.CpuConv):
    """A CpuConv that makes its codes in one pass, after a norm if it is asked to, and adds what its weight's bytes lack."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        super().__init__(weights, geometry)
        self.glue = native_glue()
        self.rest = None if weights.rest is None else weights.rest * weights.scale
        self.kernel = weights.codes.shape[2:]

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, sums = self.glue.encode(x, grid, 1, summed=self.rest is not None)
        if self.rest is None or sums is None:
            return self.multiply(codes, grid, dtype)
        products = self.multiply(codes, grid, torch.float32).contiguous(memory_format=torch.channels_last)
        lacking, absent = cast(float, grid.scale) * self.rest, cast(int, grid.zero_point) * codes.shape[1]
        self.glue.add_windows(products, sums, lacking, absent, self.kernel, self.geometry)
        return products.to(dtype)


class CompiledLinear(cpu.CpuLinear):
    """The same for matrices; grids for each token are PyTorch's work."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.glue = native_glue()
        self.rest = None if weights.rest is None else weights.rest * weights.scale

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        codes, sums = self.glue.encode(x, grid, -1, summed=self.rest is not None)
        if self.rest is None or sums is None:
            return self.multiply(codes, grid, dtype)
        products = self.multiply(codes, grid, torch.float32)
        distances = sums.unsqueeze(-1) - grid.zero_point * codes.shape[-1]
        return products.addcmul_(distances * grid.scale, self.rest).to(dtype)


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """What a trial of a weight of this shape finds."""
    if geometry.groups > 1:
        return f"a convolution in {geometry.groups} groups has no compiled sums"
    return try_conv(CompiledConv, shape, geometry, span)


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """The same for a matrix."""
    return try_linear(CompiledLinear, shape, span)


def product(left: Tensor, right: Tensor, row: Tensor | None, column: Tensor | None, scale: float) -> Tensor:
    """See `backend.Product`."""
    return cpu.product(left, right, row, column, scale, native_glue().scale_sums)


def signed(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """See `backend.SignedEncoder`."""
    return native_glue().signed(x, scale, zero_point, low, high)


def fake_log2(p: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
    """See `backend.FakeLog2`."""
    return native_glue().fake_log2(p, peak, bits, per_octave)


def softmax_signed(scores: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """See `backend.Backend`."""
    return native_glue().softmax_signed(scores, scale, zero_point, low, high)


def softmax_log2(scores: Tensor, peak: float, bits: int, per_octave: int) -> Tensor:
    """See `backend.Backend`."""
    return native_glue().softmax_log2(scores, peak, bits, per_octave)


@cache
def product_problem() -> str | None:
    """What a trial of two matrices finds."""
    return try_product(product)


COMPILED = Backend(
    missing, CompiledConv, CompiledLinear, conv_problem, linear_problem, adds_rest=True, product=product,
    product_problem=product_problem, float_product=cpu.float_product, signed=signed, fake_log2=fake_log2,
    softmax_signed=softmax_signed, softmax_log2=softmax_log2, compiled=True,
)  # fmt: skip
