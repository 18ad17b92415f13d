"""Ranges: mergeable statistics of a tensor, and the search for the range that a grid should cover."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tcaq.numerics.affine import code_range, fake_quantize, qparams


@dataclass(frozen=True)
class Range:
    """Smallest and largest value per row (channel, or one row for a whole tensor).

    Attributes: low, high: float32 [rows].
    """

    low: Tensor
    high: Tensor

    @staticmethod
    def of(x: Tensor, axis: int | None) -> Range:
        """Range of `x`, one row per index of `axis` (None: one row)."""
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
        low, high = torch.aminmax(rows, dim=1)
        return Range(low.float(), high.float())

    def merge(self, other: Range) -> Range:
        """Range of both together; associative and commutative, so parts may be observed in any order."""
        return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    @property
    def reach(self) -> Tensor:
        """Largest absolute value per row, float32 [rows]."""
        return torch.maximum(self.low.abs(), self.high.abs())


@torch.no_grad()
def search_range(
    rows: Tensor,
    bits: int,
    *,
    signed: bool,
    symmetric: bool,
    power: float,
    candidates: int,
    smallest: float = 0.2,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row that quantize `rows` best: minimum and maximum shrink together, the best pair stays.

    Score: `mean |x - x_hat|^power`. `power = 2.4` is the field's usual choice (BRECQ); infinity would be min-max.

    Args: rows: float [R, N]; candidates: how many shrink factors between `smallest` and 1 are tried (1: min-max);
        weights: optional float, broadcastable against rows, weight of each element's error (TCR: channels carry r).
    Returns: scale, zero point, float32 [R].
    """
    low, high = torch.aminmax(rows, dim=1)
    code_low, code_high = code_range(bits, signed)
    best_scale, best_zero = qparams(low, high, bits, signed, symmetric)
    if candidates <= 1:
        return best_scale, best_zero
    best_score = torch.full_like(best_scale, float("inf"))
    for factor in torch.linspace(1.0, smallest, candidates).tolist():
        scale, zero = qparams(low * factor, high * factor, bits, signed, symmetric)
        hat = fake_quantize(rows, scale.unsqueeze(1), zero.unsqueeze(1), code_low, code_high)
        error = hat.sub_(rows).abs_().pow_(power)
        score = (error if weights is None else error * weights).mean(dim=1)
        better = score < best_score
        best_score = torch.where(better, score, best_score)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
