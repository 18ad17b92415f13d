"""Stand-ins for products of two activations."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from tcaq.export.powers import Powers
from tcaq.export.standin import Codes, Dialect, Grid, ProductDialect, Steps
from tcaq.layers.product import QuantizedProduct
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import MixedProbabilityQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer

HIGHEST, LARGEST = 128.0, 255
"""The highest power of two in a byte, and the largest number."""


class ProductStandIn(nn.Module):
    """Products in integers, of operands on even grids; see QuantizedProduct.

    Keys arrive transposed, and are turned back before they become codes: bytes are transposed in a third of the time.
    """

    is_float = False

    def __init__(self, product: QuantizedProduct, dialect: ProductDialect, steps: Steps) -> None:
        super().__init__()
        self.dialect = dialect
        self.keys = isinstance(product.left_quantizer, AffineQuantizer)
        self.left = _grid(cast("AffineQuantizer | ProbabilityQuantizer", product.left_quantizer), dialect, steps, False)
        self.right = _grid(cast(AffineQuantizer, product.right_quantizer), dialect, steps, True)

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, float [batch, heads, ...]."""
        codes = self.right(right.transpose(-1, -2), 1) if self.keys else self.right(right, 1)
        codes = replace(codes, codes=codes.codes.transpose(-1, -2)) if self.keys else codes
        return self.dialect.product(self.left(left, 1), codes, scale)


class PowersStandIn(nn.Module):
    """Products of probabilities on a coarse log2 grid: powers of two are whole numbers, too, in one or two planes of bytes."""

    is_float = False
    nothing: Tensor

    def __init__(self, product: QuantizedProduct, dialect: ProductDialect, steps: Steps) -> None:
        super().__init__()
        self.dialect = dialect
        self.left = Powers(cast(ProbabilityQuantizer, product.left_quantizer), steps)
        self.right = Grid.of(cast(AffineQuantizer, product.right_quantizer), dialect, steps, second=True)
        self.register_buffer("nothing", dialect.zeros(torch.zeros(1)))

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, float [batch, heads, ...]."""
        codes, planes = self.right(right, 1), [plane for numbers in self.left(left) for plane in self._planes(*numbers)]
        return reduce(torch.add, [self.dialect.product(self._codes(*plane), codes, scale) for plane in planes])

    def _planes(self, powers: Tensor, worth: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Numbers that fit bytes, and what 1 of them is worth: larger powers exceed a byte's highest by multiples of it."""
        if self.left.largest <= HIGHEST:
            return [(powers, worth)]
        low = powers.clamp(max=HIGHEST)
        return [(low, worth), ((powers - low) / HIGHEST, worth * HIGHEST)]

    def _codes(self, numbers: Tensor, worth: Tensor) -> Codes:
        codes, zero = self.dialect.quantize(numbers, torch.ones(1), self.nothing, LARGEST, 1)
        return Codes(codes, zero, worth)


def is_even(product: QuantizedProduct) -> bool:
    """Whether a product is quantized, with codes of even distance in all step groups."""
    left = product.left_quantizer
    return left is not None and not (isinstance(left, ProbabilityQuantizer) and bool(left.use_log2.any()))


def _grid(quantizer: AffineQuantizer | ProbabilityQuantizer, dialect: Dialect, steps: Steps, second: bool) -> Grid:
    if isinstance(quantizer, AffineQuantizer):
        return Grid.of(quantizer, dialect, steps, second)
    top = quantizer.top.float() if isinstance(quantizer, MixedProbabilityQuantizer) else quantizer.last
    return Grid(quantizer.scale, torch.zeros_like(quantizer.scale), top, dialect, steps, second)
