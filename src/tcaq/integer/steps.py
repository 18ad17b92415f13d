"""Run samples that are in different step groups, each group by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tcaq.quantizers.clock import StepClock

_READ: WeakKeyDictionary[StepClock, tuple[Tensor, list[int]]] = WeakKeyDictionary()
"""What a clock showed last, and the same as numbers."""


def step_rows(clock: StepClock) -> list[int]:
    """The step group of each sample, read from the device once for all layers: on a GPU, reading waits for all that is queued."""
    if clock.count == 1:
        return [0]
    group, rows = _READ.get(clock, (None, []))
    if group is not clock.group:  # a clock that is set again shows another tensor
        rows = clock.group.tolist()
        _READ[clock] = clock.group, rows
    return rows


def by_group(rows: Sequence[int], run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`run(*inputs, group)` for the samples of each group, their results in the samples' order; inputs [batch, ...]."""
    groups = sorted(set(rows))
    if len(groups) == 1:
        return run(*inputs, groups[0])
    members = [[i for i, row in enumerate(rows) if row == group] for group in groups]
    parts = [run(*(x[own] for x in inputs), group) for own, group in zip(members, groups, strict=True)]
    return torch.cat(parts)[_places(rows)]


def _places(rows: Sequence[int]) -> list[int]:
    """Where each sample is after samples were sorted by their group."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    places = [0] * len(rows)
    for position, sample in enumerate(order):
        places[sample] = position
    return places
