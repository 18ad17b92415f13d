"""Integer kernels of our own for x86 processors with AVX-512 VNNI.

Matrix products, of which oneDNN makes a small one in more time than it takes to multiply, and 3x3 convolutions of narrow numbers
with less than half of the products: transformed numbers of four bits still fit bytes, so that Winograd's form is exact. Those of
eight bits fit 16: a quarter of the products, of which half as many are made at once. Other convolutions are oneDNN's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from tcaq.integer import cpu
from tcaq.integer.backend import Geometry, InputGrid, Kernel, Span, Weights
from tcaq.integer.native import kernels
from tcaq.integer.native.compiler import absent
from tcaq.integer.native.library import FusesNorm, native_glue
from tcaq.integer.native.vnni import BLOCK, PackedWeights, native_vnni
from tcaq.integer.native.winograd import misshapen, unsuited
from tcaq.integer.native.winograd_kernels import WideWinogradConv, WinogradConv
from tcaq.integer.trial import too_long, try_conv, try_linear

MANY = 32
"""Channels on either side, from which on whole models are faster by it than by oneDNN's convolutions."""


def missing() -> str | None:
    """Why there are no such products here."""
    return kernels.missing() or absent(native_vnni)


def helps() -> bool:
    """Whether they are the fastest of this processor."""
    return missing() is None and native_vnni().helps


class VnniLinear:
    """A matrix product of codes with int8 weights and what these lack, summed in int32."""

    def __init__(self, weights: Weights) -> None:
        self.glue, self.products, self.bias = native_glue(), native_vnni(), weights.bias
        self.packed = PackedWeights(weights)
        rest = 0 if weights.rest is None else weights.rest * weights.codes.shape[1]
        self.sums = (weights.codes.sum(1, dtype=torch.int32) + rest) * weights.scale

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Multiply float [..., in]."""
        codes, sums = self.glue.encode(x, grid, -1, summed=self.packed.lacking)
        rows, own = codes.reshape(-1, codes.shape[-1]), None if sums is None else sums.reshape(-1)
        if isinstance(grid.scale, Tensor):
            products = cpu.by_token(
                lambda zero: self.products.multiply(rows, own, self.packed, 1.0, zero, False),
                grid,
                self.sums,
                self.bias,
            )
        else:
            products = self.products.multiply(rows, own, self.packed, grid.scale, cast(int, grid.zero_point))
        return products.reshape(*codes.shape[:-1], -1).to(dtype)


class PixelConv(FusesNorm):
    """A convolution of single pixels: the same, of images that lie channels last."""

    def __init__(self, weights: Weights) -> None:
        self.glue, self.products = native_glue(), native_vnni()
        self.packed = PackedWeights(replace(weights, codes=weights.codes.flatten(1)))

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, sums = self.glue.encode(x, grid, 1, summed=self.packed.lacking)
        images, channels, height, width = codes.shape
        rows, own = codes.permute(0, 2, 3, 1).reshape(-1, channels), None if sums is None else sums.reshape(-1)
        scale, zero_point = cast(float, grid.scale), cast(int, grid.zero_point)
        products = self.products.multiply(rows, own, self.packed, scale, zero_point)
        return products.reshape(images, height, width, -1).permute(0, 3, 1, 2).to(dtype)


def conv(weights: Weights, geometry: Geometry) -> Kernel:
    """A kernel of ours for what `conv_problem` has nothing against."""
    return PixelConv(weights) if geometry == Geometry() else WinogradConv(weights, native_vnni(), BLOCK)


@cache
def conv_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Why a weight of this shape has other kernels, or what a trial of it finds."""
    pixels = shape[2:] == (1, 1) and geometry == Geometry()
    problem = too_long(shape) if pixels else unsuited(shape, geometry, span) or too_long(shape)
    return problem or try_conv(conv, shape, geometry, span)


@cache
def linear_problem(shape: tuple[int, ...], span: Span) -> str | None:
    """What a trial of a weight of this shape finds."""
    return too_long(shape) or try_linear(VnniLinear, shape, span)


VNNI = replace(
    kernels.COMPILED, missing=missing, conv=conv, linear=VnniLinear, conv_problem=conv_problem, linear_problem=linear_problem,
    helps=helps,
)  # fmt: skip


def wide_conv(weights: Weights, geometry: Geometry) -> WideWinogradConv:
    """A convolution in Winograd's form of 16 bits. Args: geometry: that `wide_problem` has nothing against."""
    return WideWinogradConv(weights, native_vnni(), BLOCK)


@cache
def wide_problem(shape: tuple[int, ...], geometry: Geometry, span: Span) -> str | None:
    """Why a weight of this shape has other kernels, or what a trial of it finds."""
    return misshapen(shape, geometry, MANY) or too_long(shape) or try_conv(wide_conv, shape, geometry, span)


VNNI_WIDE = replace(VNNI, conv=wide_conv, conv_problem=wide_problem)
"""The same, but for 3x3 convolutions of up to eight bits, which need a quarter of the products in Winograd's form of 16 bits."""
