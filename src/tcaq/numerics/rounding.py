"""AdaRound: learn for every weight whether it is rounded down or up (Nagel et al. 2020, arXiv 2004.10568).

The soft weight is `(clamp(floor(w / scale) + h(alpha) + zero_point, low, high) - zero_point) * scale` with the
rectified sigmoid `h(alpha) = clamp(sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)`; the hard one replaces h by
`alpha >= 0`.
"""

from __future__ import annotations

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1


def rectified_sigmoid(alpha: Tensor) -> Tensor:
    """h(alpha) in [0, 1], which reaches both ends at finite alpha (eq. 23)."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def initial_alpha(weight: Tensor, scale: Tensor, up: Tensor | None = None, trust: float = 0.0) -> Tensor:
    """The alpha at which the soft weight equals `weight` wherever it is inside the range.

    Args: up: bool, shape of weight, an earlier decision to start from; trust in [0, 1]: 0 starts at the weight itself,
        1 at the decision; at 0.5 and above every decision stands until a gradient overturns it.
    """
    units = weight / scale
    h = units - torch.floor(units)
    if up is not None:
        h = torch.lerp(h, up.to(h.dtype), trust)
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def soft_round(weight: Tensor, alpha: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Weight with its learned, still soft rounding; differentiable in alpha."""
    units = torch.floor(weight / scale) + rectified_sigmoid(alpha)
    return torch.clamp(units, low - zero_point, high - zero_point) * scale


def hard_codes(weight: Tensor, up: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Codes of the weight under a decided rounding; `up`: bool, shape of weight."""
    return (torch.floor(weight / scale) + up.to(weight.dtype) + zero_point).clamp(low, high)


def rounding_penalty(alpha: Tensor, beta: float | Tensor) -> Tensor:
    """`sum (1 - |2 h - 1|^beta)`: zero when every rounding is decided (eq. 24)."""
    return (1.0 - (2.0 * rectified_sigmoid(alpha) - 1.0).abs().pow(beta)).sum()
