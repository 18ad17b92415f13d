"""Keep the quantized weights' values at hand while nothing changes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tcaq.layers.weighted import QuantizedWeight


@contextmanager
def holding_weights(model: nn.Module) -> Iterator[None]:
    """Inside the block every quantized layer unpacks its weight once, not at every call: a tenth of the time of sampling.

    Layers whose codes are offloaded, and come back for a call alone, unpack them in the call. It costs the memory of a copy of the
    quantized weights, in the model's dtype; scales and codes must not change meanwhile.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = [
        module for module in model.modules() if isinstance(module, QuantizedWeight) and not module.qweight.is_meta
    ]
    with torch.no_grad():
        for layer in layers:
            layer.held = layer.quantized_weight(dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.held = None
