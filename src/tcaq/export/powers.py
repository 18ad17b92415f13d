"""Stand-in for a product whose left operand is on a coarse log2 grid: whole numbers after all, in two planes of them.

A value of such a grid is a power of two, or `√2` times one. Powers of two are whole numbers, and `√2` times one of them is that
power and `√2 - 1` times the same once more: two products of bytes, scaled and added. No code is computed, and no logarithm: a
number about 2^23 times as large as another has room for only one power of two of it, so that adding rounds it to that.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from tcaq.export.standin import Codes, Grid, ProductDialect, Steps
from tcaq.layers.product import QuantizedProduct
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import MixedProbabilityQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer

MOST_BITS = 4
"""More codes do not fit two planes of bytes."""
HIGHEST = 128
"""The largest power of two in a byte."""
BYTES = 255
DIGITS = 24
"""Of a float, binary ones."""
LOWER = 2.0**-0.2
"""Values are taken so much smaller: each is then nearer than half a power of two to the one that it shall be rounded to, for every
lift that is used."""


class PowersStandIn(nn.Module):
    """A product of probabilities on a grid of one or two values to each halving, or an even one in some step groups.

    Attributes: unit: float32 [groups], multiplies probabilities; limit: float32 [groups], the largest value after that; pull:
        float32 [groups], 1, or 0 where the grid is even: nothing is rounded to powers of two there; gain: float32 [groups], what 1
        is worth then; nothing: [1], a zero point of zero.
    """

    is_float = False
    unit: Tensor
    limit: Tensor
    pull: Tensor
    gain: Tensor
    nothing: Tensor

    def __init__(self, product: QuantizedProduct, dialect: ProductDialect, steps: Steps) -> None:
        super().__init__()
        quantizer = cast(ProbabilityQuantizer, product.left_quantizer)
        self.dialect, self.steps = dialect, (steps,)
        self.right = Grid.of(cast(AffineQuantizer, product.right_quantizer), dialect, steps, second=True)
        self.halved, log2 = quantizer.grid.per_octave == 2, quantizer.use_log2
        largest = 2.0 ** ((quantizer.last - 1) // quantizer.grid.per_octave)  # so that the smallest value is 1
        gain = torch.where(log2, quantizer.peak / largest, quantizer.scale)
        tables = {
            "unit": torch.where(log2, LOWER, 1.0) / gain, "pull": log2.float(), "gain": gain,
            "limit": torch.where(log2, largest * LOWER, float(quantizer.last)), "nothing": dialect.zeros(torch.zeros(1)),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table)
        self.mixed = not bool(log2.all())

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, float [batch, heads, ...]."""
        step, codes = self.steps[0], self.right(right, 1)
        gain, limit = (step.row(table, 1) for table in (self.gain, self.limit))
        # a number, not a tensor of one: ONNX Runtime compares with that in all threads
        x = (left * step.row(self.unit, left.dim())).clamp(max=limit.reshape(()))
        planes = self._halves(x, gain) if self.halved else self._parts(x, gain)
        first, second = (self.dialect.product(plane, codes, scale) for plane in planes)
        return first + second

    def _halves(self, x: Tensor, gain: Tensor) -> tuple[Codes, Codes]:
        """The powers of two that values are, or that they are `√2` times, and the latter ones once more."""
        below, above = self._powers(x, 0.25), self._powers(x, 0.75)
        return self._plane(below, 1.0, gain), self._plane(above - below, 1.0, gain * (math.sqrt(2) - 1))

    def _parts(self, x: Tensor, gain: Tensor) -> tuple[Codes, Codes]:
        """Powers of two up to the highest in a byte, and what larger ones exceed it by, in multiples of it."""
        powers = self._powers(x, 0.5)
        low = powers.clamp(max=HIGHEST)
        return self._plane(low, 1.0, gain), self._plane(powers - low, float(HIGHEST), gain)

    def _powers(self, x: Tensor, lift: float) -> Tensor:
        """2^n for x / LOWER in [2^(n - lift), 2^(n + 1 - lift)); x itself where the grid is even."""
        factor = 2.0 ** (DIGITS - 1 + lift) / LOWER
        large = x * (self.steps[0].row(self.pull * factor, x.dim()) if self.mixed else factor)
        return large - (large - x)

    def _plane(self, x: Tensor, divisor: float, gain: Tensor) -> Codes:
        """Bytes; a half, which is half of the smallest value, rounds to zero as the grid has it."""
        codes, zero = self.dialect.quantize(x, torch.full((1,), divisor), self.nothing, BYTES, 1)
        return Codes(codes, zero, gain * divisor)


def is_coarse(product: QuantizedProduct) -> bool:
    """Whether a product's left operand is on a log2 grid in some step group, and its values fit two planes."""
    left = product.left_quantizer
    if not isinstance(left, ProbabilityQuantizer) or isinstance(left, MixedProbabilityQuantizer):
        return False
    return bool(left.use_log2.any()) and left.grid.bits <= MOST_BITS and left.grid.per_octave <= 2
