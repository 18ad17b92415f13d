"""Show every quantized operand of a float model to a visitor, and sort steps into groups."""

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


def steps_by_group(boundaries: Tensor, timesteps: Tensor) -> dict[int, list[int]]:
    """The positions along a trajectory that fall into each step group; groups no step falls into are absent."""
    groups = torch.searchsorted(boundaries, timesteps.to(boundaries.dtype), right=True)
    table: dict[int, list[int]] = {}
    for step, group in enumerate(groups.tolist()):
        table.setdefault(group, []).append(step)
    return dict(sorted(table.items()))


def even_positions(steps: dict[int, list[int]]) -> Tensor:
    """`steps_by_group` as a table, int64 [groups present, longest]: a shorter group begins again with its first step."""
    longest = max(map(len, steps.values()))
    return torch.tensor([[group[i % len(group)] for i in range(longest)] for group in steps.values()])


def nearest_group(seen: list[int], count: int) -> Tensor:
    """For each of `count` groups the position in `seen` of the nearest group that was seen."""
    distance = (torch.arange(count)[:, None] - torch.tensor(seen)[None]).abs()
    return distance.argmin(dim=1)


def draw_rows(value: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random places of an operand [..., channels], with repeats, all channels of a place: float32 [count, channels]."""
    where = [torch.randint(size, (count,), generator=generator) for size in value.shape[:-1]]
    return value[tuple(where)].float()
