"""The best choice under a budget: one width for each layer, no more bits than there are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcaq.errors import NumericalError

UNITS = 100_000
"""In how many equal parts a budget is told at most; what a layer needs is rounded up to whole ones."""


def cheapest(costs: Tensor, sizes: Tensor, widths: Tensor, budget: int) -> Tensor:
    """The width of each layer for which the sum of costs is least and that of sizes times widths within the budget.

    A knapsack with a choice for each layer, by dynamic programming over what is spent: exact where the budget, in the largest unit
    that all needs are multiples of, has no more than UNITS of them. (Solvers of integer programs write to standard output.)

    Args: costs: float64 [layers, widths], finite; sizes: int64 [layers], numbers of weights; widths: int64 [widths], bits;
        budget: bits for all weights together.
    Returns: positions in `widths`, int64 [layers].
    Raises: NumericalError if not even the narrowest widths fit, or a cost is not finite.
    """
    if not bool(torch.isfinite(costs).all()):
        raise NumericalError(
            "a layer's sensitivity is not finite; the model's predictions, or their gradients, are not"
        )
    needed = sizes[:, None] * widths
    if (least := int(needed.amin(dim=1).sum())) > budget:
        raise NumericalError(f"the narrowest widths take {least} bits, the budget is {budget}")
    # beyond the narrowest, so that these always fit
    extra, spare = needed - needed.amin(dim=1, keepdim=True), min(budget, int(needed.amax(dim=1).sum())) - least
    unit = max(math.gcd(*extra.flatten().tolist()), -(-spare // UNITS), 1)
    units, room = -(-extra // unit), spare // unit
    best = torch.zeros(room + 1, dtype=torch.float64)
    choices = torch.empty(len(sizes), room + 1, dtype=torch.int8)
    for layer, (cost, need) in enumerate(zip(costs, units.tolist(), strict=True)):
        options = torch.full((len(need), room + 1), float("inf"), dtype=torch.float64)
        for i, taken in enumerate(need):
            if taken <= room:
                options[i, taken:] = best[: room + 1 - taken] + cost[i]
        best, choices[layer] = options.min(dim=0)
    chosen = []
    for layer in reversed(range(len(sizes))):
        chosen.append(int(choices[layer, room]))
        room -= int(units[layer, chosen[-1]])
    return torch.tensor(chosen[::-1])
