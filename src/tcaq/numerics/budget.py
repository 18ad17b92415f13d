"""The best choice under a budget: one width for each layer, no more bits than there are."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from tcaq.errors import NumericalError

LARGEST = 1e6
"""The largest cost that the solver sees; differences of a millionth are nothing to it."""


def cheapest(costs: Tensor, sizes: Tensor, widths: Tensor, budget: int) -> Tensor:
    """The width of each layer for which the sum of costs is least and that of sizes times widths within the budget.

    A knapsack with a choice for each layer, solved as an integer program (HiGHS).

    Args: costs: float64 [layers, widths], finite; sizes: int64 [layers], numbers of weights; widths: int64 [widths], bits;
        budget: bits for all weights together.
    Returns: positions in `widths`, int64 [layers].
    Raises: NumericalError if not even the narrowest widths fit, or a cost is not finite.
    """
    if not bool(torch.isfinite(costs).all()):
        raise NumericalError(
            "a layer's sensitivity is not finite; the model's predictions, or their gradients, are not"
        )
    layers, count = costs.shape
    needed = sizes[:, None] * widths
    if (least := int(needed.amin(dim=1).sum())) > budget:
        raise NumericalError(f"the narrowest widths take {least} bits, the budget is {budget}")
    # costs span orders of magnitude and the solver's tolerances are absolute: what no choice can save goes, the rest is large
    saved = costs - costs.amin(dim=1, keepdim=True)
    saved = saved / saved.max().clamp(min=torch.finfo(costs.dtype).tiny) * LARGEST
    unit = int(np.gcd.reduce(sizes.numpy()))
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(count)), 1, 1)
    within = LinearConstraint((needed // unit).flatten().numpy()[None], -np.inf, budget // unit)
    # presolving may write to standard output, which is the command's own
    found = milp(
        saved.flatten().numpy(), integrality=np.ones(layers * count), bounds=Bounds(0, 1), constraints=[one_each, within],
        options={"mip_rel_gap": 1e-6, "presolve": False},
    )  # fmt: skip
    if found.x is None:
        raise NumericalError(f"no choice of widths was found: {found.message}")
    return torch.from_numpy(found.x).reshape(layers, count).argmax(dim=1)
