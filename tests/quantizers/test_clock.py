"""The step clock against the definition of step groups."""

from __future__ import annotations

import pytest
import torch

from tcaq.quantizers.clock import StepClock
from tcaq.spec.steps import StepGroups

GROUPS = StepGroups(boundaries=(99.5, 250.0, 979.5))


def test_every_timestep_is_in_the_group_of_the_definition() -> None:
    clock = StepClock(GROUPS)
    timesteps = torch.arange(1000)
    clock.set(timesteps)
    assert clock.group.tolist() == [sum(b <= t for b in GROUPS.boundaries) for t in range(1000)]
    assert clock.count == 4


def test_a_timestep_may_be_a_number_a_scalar_or_a_batch() -> None:
    clock = StepClock(GROUPS)
    for timestep in (250, 250.0, torch.tensor(250), torch.tensor([250.0])):
        clock.set(timestep)
        assert clock.group.tolist() == [2]
    clock.set(torch.tensor([999, 0, 249]))
    assert clock.group.tolist() == [3, 0, 1]


def test_rows_are_taken_per_sample() -> None:
    clock = StepClock(GROUPS)
    table = torch.tensor([10.0, 11.0, 12.0, 13.0])
    clock.set(torch.tensor([999, 0, 249]))
    assert torch.equal(clock.row(table, 4), torch.tensor([13.0, 10.0, 11.0]).reshape(3, 1, 1, 1))
    clock.set(500)
    assert torch.equal(clock.row(table, 2), torch.tensor([[12.0]]))
    single = StepClock(StepGroups())
    single.set(torch.tensor([999, 0, 249]))
    assert torch.equal(single.row(torch.tensor([7.0]), 3), torch.tensor([[[7.0]]]))


def test_casting_the_model_does_not_move_the_boundaries() -> None:
    clock = StepClock(GROUPS).to(torch.bfloat16)  # 979.5 is no bfloat16
    clock.set(torch.tensor([979, 980]))
    assert clock.group.tolist() == [2, 3]
    assert list(clock.state_dict()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_table_may_be_on_another_device() -> None:
    clock = StepClock(GROUPS)
    clock.set(torch.tensor([999, 0], device="cuda"))
    assert clock.row(torch.arange(4.0), 1).tolist() == [3, 0]
