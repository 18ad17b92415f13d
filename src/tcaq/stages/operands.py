"""Show every quantized operand of a float model to a visitor, step group by step group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import observing
from tcaq.models.sampler import Trajectories

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


def steps_by_group(boundaries: Tensor, trajectories: Trajectories) -> dict[int, list[int]]:
    """The positions along the trajectory that fall into each step group; groups no step falls into are absent."""
    groups = torch.searchsorted(boundaries, trajectories.timesteps.to(boundaries.dtype), right=True)
    table: dict[int, list[int]] = {}
    for step, group in enumerate(groups.tolist()):
        table.setdefault(group, []).append(step)
    return dict(sorted(table.items()))


class Reservoir:
    """A bounded random sample of the rows an operand takes; the same seed and operand draw the same rows."""

    def __init__(self, values: int, parts: int, seed: int) -> None:
        """Keep about `values` numbers of each operand, evenly from `parts` visits."""
        self.values, self.parts = values, max(1, parts)
        self.rows: dict[tuple[str, str], list[Tensor]] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, operand: str, rows: Tensor) -> None:
        """Draw from `rows`, float [n, channels]; all channels of a row stay together."""
        wanted = max(1, self.values // (rows.shape[1] * self.parts))
        if len(rows) > wanted:
            rows = rows[torch.randint(len(rows), (wanted,), generator=self.generator)]
        self.rows.setdefault((name, operand), []).append(rows.float().clone())

    def drain(self) -> dict[tuple[str, str], Tensor]:
        """What was kept, float32 [n, channels] per layer and operand."""
        return {key: torch.cat(parts) for key, parts in self.rows.items()}


def as_rows(value: Tensor, axis: int) -> Tensor:
    """An operand as [everything else, channels]."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])
