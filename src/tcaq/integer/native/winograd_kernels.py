"""Kernels of 3x3 convolutions in Winograd's form, whichever set of instructions multiplies."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from tcaq.integer.backend import InputGrid, Weights
from tcaq.integer.native.library import FusesNorm, native_glue
from tcaq.integer.native.winograd import NativeWinograd, WinogradWeights
from tcaq.integer.native.winograd_wide import NativeWideWinograd, WideWeights


class Products(Protocol):
    """Compiled products of a processor, of which a kernel can be copied with its model."""

    winograd: NativeWinograd
    wide: NativeWideWinograd


class WinogradConv(FusesNorm):
    """A 3x3 convolution of codes with weights of about four bits, summed in int32."""

    def __init__(self, weights: Weights, products: Products, block: int) -> None:
        """Args: weights: that `winograd.unsuited` has nothing against; block: output channels that `products` takes at once."""
        self.glue, self.products = native_glue(), products
        self.packed = WinogradWeights(weights, block)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, _ = self.glue.encode(x, grid, 1)
        scale, zero_point = cast(float, grid.scale), cast(int, grid.zero_point)
        return self.products.winograd.convolve(codes, self.packed, scale, zero_point, grid.top).to(dtype)


class WideWinogradConv(FusesNorm):
    """The same with weights of up to eight bits and what these lack."""

    def __init__(self, weights: Weights, products: Products, block: int) -> None:
        """Args: weights: that `winograd.misshapen` has nothing against; block: output channels that `products` takes at once."""
        self.glue, self.products = native_glue(), products
        self.packed = WideWeights(weights, block)

    def __call__(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        """Convolve float [batch, in, height, width]."""
        codes, _ = self.glue.encode(x, grid, 1)
        scale, zero_point = cast(float, grid.scale), cast(int, grid.zero_point)
        return self.products.wide.convolve(codes, self.packed, scale, zero_point).to(dtype)
