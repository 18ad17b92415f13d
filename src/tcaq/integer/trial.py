"""Try a kernel on extreme numbers before a layer relies on it.

Processors without VNNI instructions add pairs of products in 16 bits and clip the sums without a word; others refuse a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer.backend import Geometry, InputGrid, Kernel, Product, Span, Weights

ROWS = 64
"""Output channels of a trial; kernels take them in blocks of up to so many."""
LONGEST = (2**31 - 1) // 255**2
"""So many products of a code and a weight, its rest included, fit 32 bits whatever they are."""


def try_conv(
    conv: Callable[[Weights, Geometry], Kernel], shape: tuple[int, ...], geometry: Geometry, span: Span,
    device: str = "cpu",
) -> str | None:  # fmt: skip
    """Why a weight of this shape is not multiplied exactly on a small image of extreme values; None if it is."""
    weight = extremes(_fewer(shape, geometry.groups), span.low, span.high)
    size = 2 + max(step * (k - 1) for step, k in zip(geometry.dilation, shape[2:], strict=True))
    codes = extremes((2, shape[1] * geometry.groups, size, size), 0, span.top)

    def expected(zero: int) -> Tensor:
        return conv2d(codes.double() - zero, weight.double(), None, *geometry.arguments)

    return compare(lambda weights: conv(weights, geometry), weight, codes, expected, span, device)


def try_linear(
    linear: Callable[[Weights], Kernel], shape: tuple[int, ...], span: Span, device: str = "cpu"
) -> str | None:
    """The same for a matrix."""
    weight, codes = extremes(_fewer(shape), span.low, span.high), extremes((8, shape[1]), 0, span.top)

    def expected(zero: int) -> Tensor:
        return (codes.double() - zero) @ weight.double().T

    return compare(linear, weight, codes, expected, span, device)


def try_product(product: Product) -> str | None:
    """Why matrices of extreme signed bytes are not multiplied exactly; None if they are."""
    left, right = extremes((2, ROWS, ROWS), -128, 127), extremes((2, ROWS, ROWS), -128, 127)
    try:
        found = product(left.to(torch.int8), right.to(torch.int8), None, None, 1.0)
    except RuntimeError as error:
        return f"its integer product is refused: {error}"
    if torch.equal(found.double(), left.double() @ right.double()):
        return None
    return "this processor does not multiply signed bytes exactly"


def too_long(shape: tuple[int, ...]) -> str | None:
    """Why sums of a weight of this shape, with what its bytes lack, may not fit 32 bits; None if they do."""
    count = prod(shape[1:])
    return None if count <= LONGEST else f"sums of {count} products may not fit 32 bits"


def _fewer(shape: tuple[int, ...], groups: int = 1) -> tuple[int, ...]:
    """The shape with at most `ROWS` output channels, if they are in one group: the sums are the same, in a tenth of the memory."""
    return shape if groups > 1 else (min(shape[0], ROWS), *shape[1:])


def extremes(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """Random ends of a range; the first row holds the upper one alone, the last the lower, for the largest sums there are."""
    upper = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    upper[0], upper[-1] = True, False
    return torch.where(upper, high, low)


def compare(
    make: Callable[[Weights], Kernel], weight: Tensor, codes: Tensor, expected: Callable[[int], Tensor], span: Span,
    device: str = "cpu",
) -> str | None:  # fmt: skip
    """Against float64, which holds all such sums exactly. Args: codes: [rows, in, ...], given as the inputs that have them."""
    equalizer = torch.ones(codes.shape[1], device=device)
    try:
        kernel = make(Weights(weight.to(device, torch.int8), torch.ones(len(weight), device=device)))
        for zero in {0, span.top // 2, span.top}:
            x = (codes - zero).to(device, torch.float32)
            found = kernel(x, InputGrid(1.0, zero, equalizer, span.top), torch.float32).cpu()
            if not torch.equal(found, expected(zero).float()):
                return f"this processor does not multiply weights {span.low} to {span.high} by codes 0 to {span.top} exactly"
    except RuntimeError as error:  # an op that refuses a shape is as good as none
        return f"its integer product is refused: {error}"
    return None
