"""The search for the range that a grid should cover."""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq.numerics.affine import code_range, fake_quantize, qparams


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
