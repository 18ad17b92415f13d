"""Where a module computes. What is recorded of a model lies on the CPU, and is brought to it batch by batch."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters and buffers; the CPU where it has none, or keeps them elsewhere between calls."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), CPU)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor on a device; what is no tensor as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def following(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator of random numbers on a device: `generator` itself on the CPU, elsewhere one that it seeds."""
    if device == CPU:
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def device_identity(module: nn.Module) -> dict[str, str]:
    """What a module's device adds to the identity of what it computes, for each kind rounds in its own way; nothing on the CPU."""
    device = device_of(module)
    return {} if device == CPU else {"device": device.type}
