"""Step groups: contiguous ranges of timesteps that share one row of quantization parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tcaq.errors import UsageError
from tcaq.spec.base import Spec

StepGrouping = Annotated[int, Field(ge=1)] | Literal["per-step"]


class StepGroups(Spec):
    """Groups keyed by timestep boundaries, so that a model runs with any number of steps and any scheduler.

    Group g holds the timesteps t with `boundaries[g-1] <= t < boundaries[g]`; everything below the first is group 0.
    """

    boundaries: tuple[float, ...] = Field(default=())

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(b <= a for a, b in pairwise(self.boundaries)):
            raise ValueError(f"boundaries must ascend strictly, given {self.boundaries}")
        return self

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.boundaries) + 1

    @classmethod
    def of(cls, grouping: StepGrouping, timesteps: Sequence[float]) -> Self:
        """Groups for a calibration schedule.

        Args: grouping: n (contiguous groups holding about equally many distinct calibration steps) or "per-step";
            timesteps: the schedule, in any order, repeats allowed.
        Raises: UsageError if fewer than one group is asked for, or the schedule is empty.
        """
        distinct = sorted({float(t) for t in timesteps})
        if not distinct or (grouping != "per-step" and grouping < 1):
            raise UsageError(
                f"{grouping!r} step groups over {len(distinct)} timesteps were asked for; "
                "give a number from 1 on, or 'per-step', and a schedule of at least one timestep"
            )
        count = len(distinct) if grouping == "per-step" else min(grouping, len(distinct))
        starts = [distinct[round(g * len(distinct) / count)] for g in range(1, count)]
        before = {b: a for a, b in pairwise(distinct)}
        return cls(boundaries=tuple((before[s] + s) / 2 for s in starts))
