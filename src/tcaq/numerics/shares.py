"""How many calibration inputs each sampling step gets: shares of steps, and whole numbers that follow them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skewed_normal(timesteps: Tensor, last: float, mean: float, deviation: float) -> Tensor:
    """Share of each timestep when t is drawn from N(mean * last, (deviation * last)^2), clamped to [0, last].

    The law of PTQ4DM (Shang et al., CVPR 2023). A draw belongs to the nearest of the timesteps. Shares are
    the law's exact masses: nothing is random here.

    Args: timesteps: [steps], distinct, any order; last: the largest timestep of training.
    Returns: float64 [steps], sum 1.
    """
    ordered, order = timesteps.double().sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    below = [0.5 * (1 + math.erf((t - mean * last) / (deviation * last * math.sqrt(2)))) for t in middles.tolist()]
    edges = torch.tensor([0.0, *below, 1.0], dtype=torch.float64)
    shares = torch.empty_like(ordered)
    shares[order] = edges.diff()
    return shares


def active(entropy: Tensor, total: int, price: float) -> Tensor:
    """Visits of each step when each next input goes to the step with the largest `entropy - price * visits`.

    The active selection of APQ-DM (Wang et al., CVPR 2024).

    Args: entropy: float [steps], nats; total: inputs to hand out.
    Returns: int64 [steps], sum `total`.
    """
    visits = torch.zeros(len(entropy), dtype=torch.int64)
    for _ in range(total):
        visits[torch.argmax(entropy - price * visits)] += 1
    return visits


def quotas(shares: Tensor, total: int, most: int) -> Tensor:
    """Whole numbers in proportion to shares, by largest remainders, ties to the first; no step gets more than `most`.

    Returns: int64 [steps]; the sum is `total`, or what steps of positive share can hold if that is less.
    """
    shares = shares.double()
    total = min(total, most * int((shares > 0).sum()))
    given = torch.zeros(len(shares), dtype=torch.int64)
    while (left := total - int(given.sum())) > 0:
        open_ = torch.where(given < most, shares, 0.0)
        wanted = open_ / open_.sum() * left
        whole = wanted.floor().long()
        first = torch.argsort(wanted - whole, descending=True, stable=True)[: left - int(whole.sum())]
        whole[first] += 1
        given = (given + whole).clamp(max=most)
    return given
