"""The two products of an attention in integers, where both of their grids are evenly spaced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from tcaq.integer.backend import Backend, Product, SignedEncoder
from tcaq.integer.steps import by_group, step_rows
from tcaq.integer.trial import LONGEST
from tcaq.layers.modes import Mode
from tcaq.layers.product import OperandQuantizer, QuantizedProduct
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import row_widths
from tcaq.quantizers.probability import ProbabilityQuantizer

MIDDLE = 128


@dataclass(frozen=True)
class Rows:
    """The even grid of an operand in each step group: scales, zero points and largest codes."""

    scales: list[float]
    zero_points: list[int]
    tops: list[int]

    @classmethod
    def of(cls, quantizer: OperandQuantizer) -> Self:
        """What a quantizer's table says; of probabilities on a log2 grid, what it would be on an even one."""
        zero_points = torch.zeros_like(quantizer.scale, dtype=torch.int64)
        if isinstance(quantizer, AffineQuantizer):
            zero_points += quantizer.zero_point - quantizer.limits[0]
        return cls(quantizer.scale.tolist(), zero_points.tolist(), (2 ** row_widths(quantizer) - 1).tolist())

    def codes(self, x: Tensor, group: int, encode: SignedEncoder) -> tuple[Tensor, int]:
        """x in signed bytes, int8, and what each lacks to its distance from the zero point: nothing, if all of these fit a byte."""
        zero, top = self.zero_points[group], self.tops[group]
        shift = zero if zero <= MIDDLE and top - zero < MIDDLE else MIDDLE
        return encode(x, self.scales[group], zero - shift, -shift, top - shift), shift - zero


class IntegerProduct(QuantizedProduct):
    """A QuantizedProduct that adds up products of whole numbers, and scales each sum once.

    Probabilities on a log2 grid are no multiples of one number. In step groups that have them it multiplies what the fake layer
    multiplies, in float.
    """

    def __init__(self, layer: QuantizedProduct, backend: Backend) -> None:
        """Args: layer: with quantizers, which are taken over; backend: that has products."""
        super().__init__(None, product_clock(layer))
        self.left_quantizer, self.right_quantizer = layer.left_quantizer, layer.right_quantizer
        left, right = layer.operands.values()
        self._rows = Rows.of(left), Rows.of(right)
        self._uneven = frozenset(uneven_groups(layer))
        self._peaks: list[float] = left.peak.tolist() if isinstance(left, ProbabilityQuantizer) else []
        self._kernels = backend

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, in the operands' dtype."""
        rows = step_rows(product_clock(self))
        even = self._uneven.isdisjoint(rows)
        if self.mode is not Mode.FAKE or left.shape[-1] > LONGEST or not (even or left.dtype == torch.float32):
            return super().forward(left, right, scale=scale)
        if even:
            return by_group(rows, lambda *given: self._integer(scale, *given), left, right)
        return self._float(self._probabilities(rows, left), right, scale)

    def of_softmax(self, scores: Tensor, right: Tensor) -> Tensor | None:
        """`softmax(scores) @ right`, the softmax in one pass with its quantization; None where there is no such way.

        Args: scores: float [batch, heads, tokens, tokens]; overwritten.
        """
        groups, (left, _) = set(step_rows(product_clock(self))), self.operands.values()
        if self.mode is not Mode.FAKE or scores.dtype != torch.float32 or scores.shape[-1] > LONGEST or len(groups) > 1:
            return None
        group = groups.pop()
        if group not in self._uneven:
            return self._integer(1.0, scores, right, group, self._kernels.softmax_signed)
        if type(left) is not ProbabilityQuantizer:  # whose subclasses have other grids in each group
            return None
        grid = left.grid
        return self._float(
            self._kernels.softmax_log2(scores, self._peaks[group], grid.bits, grid.per_octave), right, 1.0
        )

    def _integer(
        self, scale: float, left: Tensor, right: Tensor, group: int, encode: SignedEncoder | None = None
    ) -> Tensor:
        """On samples that are all in one step group. Args: encode: makes codes of `left`, if not as of `right`."""
        encoders = encode or self._kernels.signed, self._kernels.signed
        (a, to_a), (b, to_b) = (
            rows.codes(x, group, own) for rows, x, own in zip(self._rows, (left, right), encoders, strict=True)
        )
        a, b = a.flatten(0, -3), b.flatten(0, -3)
        # (a + to_a) (b + to_b), of which the kernel adds up a b
        row = to_b * (_sums(a, -1) + to_a * a.shape[-1]) if to_b else None
        column = to_a * _sums(b, -2) if to_a else None
        multiply = cast(Product, self._kernels.product)
        step = scale * math.prod(rows.scales[group] for rows in self._rows)
        result: Tensor = multiply(a, b, row, column, step).unflatten(0, left.shape[:-2]).to(left.dtype)
        return result

    def _float(self, left: Tensor, right: Tensor, scale: float) -> Tensor:
        """What the fake layer multiplies, in float32. Args: left: quantized already."""
        _, quantizer = self.operands.values()
        hats = left.flatten(0, -3), quantizer(right).flatten(0, -3)
        product: Tensor = self._kernels.float_product(*hats).unflatten(0, left.shape[:-2])
        return product if scale == 1 else product * scale

    def _probabilities(self, rows: Sequence[int], p: Tensor) -> Tensor:
        """Quantized p, in one pass where all samples have the same log2 grid."""
        (quantizer, _), groups = self.operands.values(), set(rows)
        if (
            len(groups) > 1 or type(quantizer) is not ProbabilityQuantizer
        ):  # whose subclasses have other grids in each group
            return cast(Tensor, quantizer(p))
        grid = quantizer.grid
        return self._kernels.fake_log2(p, self._peaks[groups.pop()], grid.bits, grid.per_octave)


def _sums(codes: Tensor, dim: int) -> Tensor:
    return codes.sum(dim, keepdim=True, dtype=torch.int32)


def product_clock(layer: QuantizedProduct) -> StepClock:
    """The denoiser's clock, as the quantizers of a product know it."""
    return cast(AffineQuantizer, layer.right_quantizer).clock


def uneven_groups(layer: QuantizedProduct) -> list[int]:
    """Step groups in which an operand is on a log2 grid."""
    found: set[int] = set()
    for quantizer in layer.operands.values():
        if isinstance(quantizer, ProbabilityQuantizer) and quantizer.grid.code != "unit":
            found |= set(quantizer.use_log2.nonzero().flatten().tolist())
    return sorted(found)
