"""Show every quantized operand of a float model to a visitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import observing

Visitor = Callable[[str, str, Tensor], None]
"""Called with a layer's name, an operand's name (input; left, right) and the operand's value."""


@contextmanager
def visiting(denoiser: nn.Module, visit: Visitor) -> Iterator[None]:
    """Inside the block the denoiser runs in float and every operand of a quantized layer is shown to `visit`."""

    def show(name: str, operands: list[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, values: tuple[Any, ...]) -> None:
            for operand, value in zip(operands, values, strict=True):
                visit(name, operand, value.detach())

        return hook

    handles = [
        layer.register_forward_pre_hook(show(name, list(layer.operands))) for name, layer in quantized_layers(denoiser)
    ]
    try:
        with observing(denoiser), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def draw_rows(value: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random places of an operand [..., channels], with repeats: float32 [count, channels]."""
    where = [torch.randint(size, (count,), generator=generator) for size in value.shape[:-1]]
    return value[tuple(torch.stack(where).to(value.device))].float()
