"""What a device must offer so that layers can run on its integer units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Kernel = Callable[[Tensor, float, int, torch.dtype], Tensor]
"""Codes uint8 of inputs, the scale and zero point that they have, and the dtype to put out -> products, scaled."""

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]
"""Signed bytes a int8 [n, rows, inner] and b int8 [n, inner, columns], what to add to the sums of each row and column, int32 [n,
rows, 1] and [n, 1, columns] or None, and the scale of all sums -> `(a @ b + row + column) * scale`, float32 [n, rows, columns]."""

FloatProduct = Callable[[Tensor, Tensor], Tensor]
"""Float32 matrices [n, rows, inner] and [n, inner, columns] -> [n, rows, columns]."""


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: each [height, width] but `groups`; padding with zeros, on both sides alike."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """In the order in which ops take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


@dataclass(frozen=True)
class Span:
    """The numbers that meet in a layer: weights in [low, high], codes of inputs in [0, top]."""

    low: int
    high: int
    top: int


@dataclass(frozen=True)
class Backend:
    """Integer kernels of a kind of device.

    Attributes: missing: why nothing can run there, or None; conv, linear: build a kernel from a weight int8 [out, ...], its
        scale float32 [out], a bias float32 [out] or None (and a convolution's geometry); conv_problem, linear_problem: why a
        weight of a shape cannot run exactly with such numbers, or None; product, product_problem: the same for matrices that are
        both activations, of any shape; float_product: of floats.
    """

    missing: Callable[[], str | None]
    conv: Callable[[Tensor, Tensor, Tensor | None, Geometry], Kernel]
    linear: Callable[[Tensor, Tensor, Tensor | None], Kernel]
    conv_problem: Callable[[tuple[int, ...], Geometry, Span], str | None]
    linear_problem: Callable[[tuple[int, ...], Span], str | None]
    product: Product | None = None
    product_problem: Callable[[], str | None] = lambda: "products of two activations have no integer kernel"
    float_product: FloatProduct = torch.bmm
