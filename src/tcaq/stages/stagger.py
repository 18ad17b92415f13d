"""Stagger: step sizes of neighbouring steps differ, so that what hardly changes between steps is not rounded alike at each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tcaq.quantizers.mixed import row_widths
from tcaq.spec.recipe import Stagger
from tcaq.stages.scale import affine_operands

GOLDEN = (math.sqrt(5) - 1) / 2


def stagger(denoiser: nn.Module, spec: Stagger) -> None:
    """Multiply the step sizes of affine operands by what their step group's turn is.

    Rows that something else than the data fixes stay as they are, and so do those wider than `spec.bits`.
    """
    for _, _, quantizer, _ in affine_operands(denoiser):
        if not quantizer.given:
            own = turns(quantizer.clock.count, spec.spread).to(quantizer.scale.device)
            narrow = (row_widths(quantizer) <= spec.bits).to(own.device)
            quantizer.set_rows(torch.where(narrow, quantizer.scale * own, quantizer.scale), quantizer.zero_point)


def turns(groups: int, spread: float) -> Tensor:
    """Factors between `exp(-spread)` and `exp(spread)`, float32 [groups]; 1 for a single group.

    They follow the multiples of the golden ratio, which are far apart for neighbours whatever the stride: samplers of fewer steps
    than were calibrated take every second or third group.
    """
    if groups == 1:
        return torch.ones(1)
    places = torch.arange(groups, dtype=torch.float64) * GOLDEN % 1.0
    return torch.exp(spread * (2.0 * places - 1.0)).float()
