"""Step groups: contiguous, keyed by timestep boundaries, for any schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq.errors import UsageError
from tcaq.spec.steps import StepGroups

SCHEDULES = st.lists(st.integers(0, 999), min_size=1, max_size=120)


def group_of(groups: StepGroups, t: float) -> int:
    """By the definition: how many boundaries lie at or below t."""
    return sum(boundary <= t for boundary in groups.boundaries)


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_per_step_puts_each_distinct_timestep_into_its_own_group(schedule: list[int]) -> None:
    groups = StepGroups.of("per-step", schedule)
    distinct = sorted(set(schedule))
    assert groups.count == len(distinct)
    assert [group_of(groups, t) for t in distinct] == list(range(len(distinct)))


@settings(max_examples=60, deadline=None)
@given(SCHEDULES, st.integers(1, 150))
def test_n_groups_are_contiguous_balanced_and_none_is_empty(schedule: list[int], n: int) -> None:
    groups = StepGroups.of(n, schedule)
    distinct = sorted(set(schedule))
    members = [group_of(groups, t) for t in distinct]
    assert groups.count == min(n, len(distinct))
    assert members == sorted(members)
    sizes = [members.count(g) for g in range(groups.count)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    # every timestep there is falls into a group, and into that of its nearest neighbours in the schedule
    for t in range(1000):
        assert 0 <= group_of(groups, t) < groups.count
    assert group_of(groups, -1e9) == 0
    assert group_of(groups, 1e9) == groups.count - 1


def test_boundaries_lie_between_neighbours() -> None:
    assert StepGroups.of("per-step", [0, 20, 10, 30]).boundaries == (5.0, 15.0, 25.0)
    assert StepGroups.of(2, [0, 20, 10, 30]).boundaries == (15.0,)
    assert StepGroups.of(1, [0, 20]).boundaries == ()


def test_a_quadratic_schedule_repeats_timesteps_and_still_has_groups() -> None:
    quad = (np.linspace(0, (1000 * 0.8) ** 0.5, 100) ** 2).astype(int).tolist()
    assert len(set(quad)) < len(quad)
    groups = StepGroups.of("per-step", quad)
    assert groups.count == len(set(quad))
    assert StepGroups.of(100, quad) == groups
    assert StepGroups.of(7, quad).count == 7


def test_the_schedules_order_does_not_matter_and_timesteps_may_be_tensors() -> None:
    schedule = torch.arange(981, -1, -20)
    assert StepGroups.of(5, schedule.tolist()) == StepGroups.of(5, schedule.flip(0).tolist())


@pytest.mark.parametrize("boundaries", [(3.0, 3.0), (5.0, 1.0), (float("nan"),), (1.0, float("inf"))])
def test_boundaries_that_do_not_ascend_or_are_not_numbers_are_refused(boundaries: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="boundaries"):
        StepGroups.parse({"boundaries": boundaries}, where="groups")


@pytest.mark.parametrize(("grouping", "schedule"), [(0, [1, 2]), (-3, [1, 2]), (4, []), ("per-step", [])])
def test_no_groups_and_no_schedule_are_refused(grouping: int, schedule: list[float]) -> None:
    with pytest.raises(UsageError, match="step groups over"):
        StepGroups.of(grouping, schedule)
