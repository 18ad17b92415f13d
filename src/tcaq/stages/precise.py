"""Run a part of a model in float32 for a while, whatever dtype the model was loaded in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def precise(module: nn.Module) -> Iterator[None]:
    """Inside the block the parameters of `module` are float32; afterwards they are what they were, bit for bit.

    A unit is fitted this way, so that gradients are not rounded to a half-precision model's few digits, and only one unit at a
    time takes the memory.
    """
    kept = {p: p.data for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    for parameter in kept:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
