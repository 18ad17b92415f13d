"""Which calibration steps fill which row of a quantizer's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tcaq.numerics.shares import quotas

Classes = Callable[[str], Tensor | None]
"""Gives for a layer's name the class of each step, int64 [steps] or [1]; a class has one row. None: each group has a row."""

ONE_ROW = torch.zeros(1, dtype=torch.int64)
"""All steps are of one class."""


def own_rows(layer: str) -> None:
    """Every step group has a row of its own."""


@dataclass(frozen=True)
class Rows:
    """A table's rows and where they come from.

    Attributes: positions: int64 [classes, n], the steps each class is made of, more than once where they count more;
        of_group: int64 [groups], the class whose row a step group takes; seen: the groups that a calibration step fell into.
    """

    positions: Tensor
    of_group: Tensor
    seen: list[int]


def table_rows(
    boundaries: Tensor, timesteps: Tensor, shares: Tensor | None = None, classes: Tensor | None = None
) -> Rows:
    """Rows for step groups with these boundaries.

    A group that no step fell into takes the row of the nearest one; a class without any share counts its steps alike.

    Args: boundaries: float [groups - 1]; timesteps: [steps]; shares: float [steps], how much each step counts (None: alike);
        classes: see Classes.
    """
    groups = torch.searchsorted(boundaries, timesteps.to(boundaries.dtype), right=True)
    classes = groups if classes is None else classes.expand(len(timesteps))
    shares = torch.ones(len(timesteps)) if shares is None else shares
    names, members = torch.unique(classes, return_inverse=True)
    of_class = [(members == i).nonzero().flatten() for i in range(len(names))]
    longest = max(map(len, of_class))
    positions = torch.stack([spread(part, shares[part], longest) for part in of_class])
    class_of = dict(zip(groups.tolist(), members.tolist(), strict=True))
    seen = sorted(class_of)
    of_seen = torch.tensor([class_of[group] for group in seen])
    return Rows(positions, of_seen[nearest_group(seen, len(boundaries) + 1)], seen)


def spread(positions: Tensor, shares: Tensor, length: int) -> Tensor:
    """`length` entries of `positions`, each about as often as its share says."""
    shares = shares if bool((shares > 0).any()) else torch.ones_like(shares)
    return positions.repeat_interleave(quotas(shares, length, length))


def nearest_group(seen: list[int], count: int) -> Tensor:
    """For each of `count` groups the position in `seen` of the nearest group that was seen."""
    distance = (torch.arange(count)[:, None] - torch.tensor(seen)[None]).abs()
    return distance.argmin(dim=1)
