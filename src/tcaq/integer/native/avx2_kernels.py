"""Integer kernels of our own for x86 processors with AVX2 and without VNNI.

oneDNN moves each sum of two products to 32 bits there, and multiplies weights of eight bits in two parts, since sums of two such
products may not fit 16 bits. What avx2.c does depends on the numbers: sums of narrow ones stay in 16 bits as long as they fit, wide
ones are multiplied as numbers of 16 bits, in one part.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from tcaq.integer import cpu
from tcaq.integer.backend import Geometry, InputGrid, Span, Weights
from tcaq.integer.native import kernels
from tcaq.integer.native.avx2 import BLOCK, PackedWeights, fitting_pairs, native_products
from tcaq.integer.native.compiler import absent
from tcaq.integer.native.library import FusesNorm, native_glue
from tcaq.integer.native.winograd import FEWEST, KERNEL, misshapen, pairs, unsuited
from tcaq.integer.native.winograd_kernels import WideWinogradConv, WinogradConv
from tcaq.integer.trial import too_long, try_conv, try_linear, try_product
from tcaq.processor import has_vnni

MANY = 96
"""Channels on either side, below which narrow numbers are multiplied faster as they are than in Winograd's form of 16 bits."""


def missing() -> str | None:
    """Why there are no such products here."""
    return kernels.missing() or absent(native_products)


def helps() -> bool:
    """Whether they are the fastest of this processor; where it says that it has VNNI, nothing is compiled to find out."""
    return not has_vnni() and missing() is None and native_products().helps


class Avx2Conv(FusesNorm):
    """A convolution of codes with int8 weights and what these lack, summed in int32."""

    def __init__(self, weights: Weights, geometry: Geometry) -> None:
        self.glue, self.products = native_glue(), native_products()
        self.packed = PackedWeights(weights, geometry)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, _ = self.glue.encode(x, grid, 1)
        scale, zero_point = cast(float, grid.scale), cast(int, grid.zero_point)
        return self.products.convolve(codes, self.packed, scale, zero_point, grid.top).to(dtype)


class Avx2Linear:
    """The same for matrices: a convolution of 1 by 1 over one row of pixels."""

    def __init__(self, weights: Weights) -> None:
        self.glue, self.products, self.bias = native_glue(), native_products(), weights.bias
        self.packed = PackedWeights(replace(weights, codes=weights.codes[:, :, None, None]), Geometry())
        rest = 0 if weights.rest is None else weights.rest * weights.codes.shape[1]
        self.sums = (weights.codes.sum(1, dtype=torch.int32) + rest) * weights.scale

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        codes, _ = self.glue.encode(x, grid, -1)
        rows = codes.reshape(-1, codes.shape[-1])
        if isinstance(grid.scale, Tensor):
            products = cpu.by_token(
                lambda zero: self._product(rows, 1.0, zero, grid.top, False), grid, self.sums, self.bias
            )
        else:
            products = self._product(rows, grid.scale, cast(int, grid.zero_point), grid.top, True)
        return products.reshape(*codes.shape[:-1], -1).to(dtype)

    def _product(self, rows: Tensor, scale: float, zero_point: int, top: int, biased: bool) -> Tensor:
        pixels = rows.T[None, :, None]
        found = self.products.convolve(pixels, self.packed, scale, zero_point, top, biased)
        return found[0, :, 0].T


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """What a trial of a weight of this shape finds."""
    if geometry.groups > 1:
        return f"a convolution in {geometry.groups} groups has no kernel of ours"
    return too_long(shape) or try_conv(Avx2Conv, shape, geometry, span)


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """The same for a matrix."""
    return too_long(shape) or try_linear(Avx2Linear, shape, span)


def product(left: Tensor, right: Tensor, row: Tensor | None, column: Tensor | None, scale: float) -> Tensor:
    """See `backend.Product`."""
    products = native_products()
    if left.shape[2] > products.longest:
        return kernels.product(left, right, row, column, scale)
    return products.multiply(left, right, row, column, scale)


@cache
def product_problem() -> str | None:
    """What a trial of two matrices finds."""
    return try_product(product)


AVX2 = replace(
    kernels.COMPILED, missing=missing, conv=Avx2Conv, linear=Avx2Linear, conv_problem=conv_problem, linear_problem=linear_problem,
    product=product, product_problem=product_problem, helps=helps,
)  # fmt: skip


def narrow_conv(weights: Weights, geometry: Geometry) -> WinogradConv:
    """A convolution in Winograd's form. Args: geometry: that `narrow_problem` has nothing against."""
    return WinogradConv(weights, native_products(), BLOCK)


@cache
def narrow_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Why a weight of this shape is better convolved as it is, or what a trial of it finds."""
    if problem := unsuited(shape, geometry, span) or too_long(shape):
        return problem
    largest = KERNEL * max(-span.low, span.high)
    if pairs(largest, span.top) < 2:
        return f"transformed weights {span.low} to {span.high} and codes 0 to {span.top} do not fit 16 bits twice"
    return try_conv(narrow_conv, shape, geometry, span)


AVX2_NARROW = replace(AVX2, conv=narrow_conv, conv_problem=narrow_problem)
"""The same, but for 3x3 convolutions of four bits, which need less than half of the products in Winograd's form."""


def wide_conv(weights: Weights, geometry: Geometry) -> WideWinogradConv:
    """A convolution in Winograd's form of 16 bits. Args: geometry: that `wide_problem` has nothing against."""
    return WideWinogradConv(weights, native_products(), BLOCK)


@cache
def wide_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Why a weight of this shape is better convolved as it is, or what a trial of it finds."""
    narrow = fitting_pairs(max(-span.low, span.high, 1), span.top) >= 2  # and multiplied as bytes, twice as fast
    problem = misshapen(shape, geometry, MANY if narrow else FEWEST) or too_long(shape)
    return problem or try_conv(wide_conv, shape, geometry, span)


AVX2_WIDE = replace(AVX2, conv=wide_conv, conv_problem=wide_problem)
"""The same, but for 3x3 convolutions of up to eight bits, which need a quarter of the products in Winograd's form of 16 bits."""
