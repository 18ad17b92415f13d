"""DAQ's question: are these values better described by a power law than by an alternative?

Both are fitted to the values `p >= p_min` in closed form: by maximum likelihood, the log-normal by its moments.
`R = sum (l_powerlaw - l_alternative)`, normalised by `sigma * sqrt(n)` (Vuong's test, as in Clauset, Shalizi and Newman
2009, appendix C); `R > 0` speaks for the power law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Alternative = Literal["exponential", "lognormal"]


@dataclass(frozen=True)
class TailFit:
    """What a comparison found.

    Attributes: alpha: exponent of the power law; ratio: R, normalised; count: values at or above p_min.
    """

    alpha: float
    ratio: float
    count: int


def _powerlaw(p: Tensor, p_min: float) -> tuple[Tensor, float]:
    logs = torch.log(p / p_min)
    alpha = 1.0 + p.numel() / float(logs.sum().clamp(min=1e-300))
    return math.log((alpha - 1.0) / p_min) - alpha * logs, alpha


def _exponential(p: Tensor, p_min: float) -> Tensor:
    rate = 1.0 / float((p - p_min).mean().clamp(min=1e-300))
    return math.log(rate) - rate * (p - p_min)


def _lognormal(p: Tensor, p_min: float) -> Tensor:
    """Log-normal on the values above p_min: moments of ln p, density renormalised by its mass above p_min."""
    logs = torch.log(p)
    mean, deviation = float(logs.mean()), float(logs.std(correction=0).clamp(min=1e-12))
    tail = 0.5 * math.erfc((math.log(p_min) - mean) / (deviation * math.sqrt(2)))
    inner = -((logs - mean) ** 2) / (2 * deviation**2) - logs
    return inner - math.log(deviation * math.sqrt(2 * math.pi)) - math.log(max(tail, 1e-300))


def compare(values: Tensor, p_min: float, alternative: Alternative = "exponential") -> TailFit:
    """Fit both laws to the values at or above p_min and compare them.

    Args: values: float, any shape, >= 0; p_min > 0.
    Returns: TailFit; fewer than two distinct values give R = 0 (undecided, which means: uniform).
    """
    p = values.reshape(-1).double()
    p = p[p >= p_min]
    if p.numel() < 2 or float(p.max()) == float(p.min()):
        return TailFit(alpha=float("inf"), ratio=0.0, count=p.numel())
    power, alpha = _powerlaw(p, p_min)
    other = _exponential(p, p_min) if alternative == "exponential" else _lognormal(p, p_min)
    difference = power - other
    deviation = float(difference.std(correction=0))
    if deviation == 0.0:
        return TailFit(alpha=alpha, ratio=0.0, count=p.numel())
    return TailFit(alpha=alpha, ratio=float(difference.sum()) / (deviation * math.sqrt(p.numel())), count=p.numel())
