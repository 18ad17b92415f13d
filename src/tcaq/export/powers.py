"""Stand-in for a product whose left operand is on a coarse log2 grid: whole numbers after all, in two planes of them.

A value of such a grid is a power of two, or `√2` times one. Powers of two are whole numbers of the smallest one, and the distance
from a power of two to `√2` times it is `√2 - 1` times another, so that two products of bytes, scaled and added, are the product
of the grid's values. Codes are never computed, and no logarithm: what a float adds to a much larger one is rounded to a power of two.
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
"""Powers of more codes do not fit two planes of bytes."""
HIGHEST = 128
"""The largest power of two in a byte."""
BYTES = 255
ROUNDED = 24
"""Bits of a float: one so many powers of two above another rounds it to a power of two."""
LOWER = 2.0**-0.2
"""Values are taken so much smaller that each lies within half of the power that it is rounded to, whichever of two grids that is on."""


class PowersStandIn(nn.Module):
    """A product of probabilities on a grid of one or two values to each halving, or an even one in some step groups.

    Attributes: unit: float32 [groups], multiplies probabilities; limit: float32 [groups], the largest value after that; pull:
        float32 [groups], 1, or 0 where the grid is even: nothing is rounded to powers of two there; gain: float32 [groups], what a
        whole number of the first plane is worth.
    """

    is_float = False
    unit: Tensor
    limit: Tensor
    pull: Tensor
    gain: Tensor

    def __init__(self, product: QuantizedProduct, dialect: ProductDialect, steps: Steps) -> None:
        super().__init__()
        quantizer = cast(ProbabilityQuantizer, product.left_quantizer)
        self.dialect, self.steps = dialect, (steps,)
        self.right = Grid.of(cast(AffineQuantizer, product.right_quantizer), dialect, steps, second=True)
        self.halved = quantizer.grid.per_octave == 2
        largest = 2.0 ** ((quantizer.last - 1) // quantizer.grid.per_octave)  # of whole numbers: the smallest value is 1
        chosen, even = quantizer.use_log2, torch.tensor(float(quantizer.last))
        gain = torch.where(chosen, quantizer.peak / largest, quantizer.scale)
        limit = torch.where(chosen, torch.tensor(largest * LOWER), even)
        self.register_buffer("unit", torch.where(chosen, LOWER, 1.0) / gain)
        self.register_buffer("limit", limit)
        self.register_buffer("pull", chosen.float())
        self.register_buffer("gain", gain)
        self.register_buffer("nothing", dialect.zeros(torch.zeros(1)))

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, float [batch, heads, ...]."""
        step, right_codes = self.steps[0], self.right(right, 1)
        unit, limit = (step.row(table, left.dim()) for table in (self.unit, self.limit))
        gain = step.row(self.gain, 1)
        x = torch.minimum(left * unit, limit)
        planes = self._halves(x, gain) if self.halved else self._parts(x, gain)
        first, second = (self.dialect.product(plane, right_codes, scale) for plane in planes)
        return first + second

    def _halves(self, x: Tensor, gain: Tensor) -> tuple[Codes, Codes]:
        """The next power of two below each value, or the value itself, and what lies between."""
        below, above = self._powers(x, 0.25), self._powers(x, 0.75)
        return self._plane(below, 1.0, gain), self._plane(above - below, 1.0, gain * (math.sqrt(2) - 1))

    def _parts(self, x: Tensor, gain: Tensor) -> tuple[Codes, Codes]:
        """Powers of two up to the highest in a byte, and what larger ones exceed it by, in multiples of it."""
        powers = self._powers(x, 0.5)
        low = powers.clamp(max=HIGHEST)
        return self._plane(low, 1.0, gain), self._plane(powers - low, float(HIGHEST), gain)

    def _powers(self, x: Tensor, lift: float) -> Tensor:
        """x / LOWER in [2^(n - lift), 2^(n + 1 - lift)) as 2^n; x itself where the grid is even."""
        factor = 2.0 ** (ROUNDED - 1 + lift) / LOWER
        pull = self.pull * factor
        even = not bool(self.pull.all())
        large = x * (self.steps[0].row(pull, x.dim()) if even else factor)
        return large - (large - x)

    def _plane(self, x: Tensor, divisor: float, gain: Tensor) -> Codes:
        codes, zero = self.dialect.quantize(x, torch.full((1,), divisor), cast(Tensor, self.nothing), BYTES, 1)
        return Codes(codes, zero, gain * divisor)


def is_coarse(product: QuantizedProduct) -> bool:
    """Whether a product's left operand is on a log2 grid in some step group, and its values fit two planes."""
    left = product.left_quantizer
    if not isinstance(left, ProbabilityQuantizer) or isinstance(left, MixedProbabilityQuantizer):
        return False
    return bool(left.use_log2.any()) and left.grid.bits <= MOST_BITS and left.grid.per_octave <= 2
