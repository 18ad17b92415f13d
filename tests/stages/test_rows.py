"""Rows of tables: who reads which steps."""

from __future__ import annotations

import torch

from tcaq.stages.rows import nearest_group, spread, table_rows

STEPS = torch.tensor([900, 700, 500, 300, 100])  # as a sampler visits them


def test_each_group_reads_its_own_steps():
    rows = table_rows(torch.tensor([400.0]), STEPS)
    assert [sorted(row) for row in rows.positions.tolist()] == [[3, 3, 4], [0, 1, 2]]  # the shorter one begins again
    assert rows.of_group.tolist() == [0, 1]
    assert rows.seen == [0, 1]


def test_a_group_without_a_step_takes_its_neighbour_s_row():
    rows = table_rows(torch.tensor([50.0, 400.0, 950.0]), STEPS)
    assert rows.seen == [1, 2]
    assert rows.of_group.tolist() == [0, 0, 1, 1]
    assert nearest_group([1, 4], 6).tolist() == [0, 0, 0, 1, 1, 1]


def test_steps_of_one_class_share_a_row_wherever_they_are():
    boundaries = torch.tensor([200.0, 400.0, 600.0, 800.0])
    rows = table_rows(boundaries, STEPS, classes=torch.tensor([7, 2, 7, 2, 7]))
    assert [sorted(row) for row in rows.positions.tolist()] == [[1, 1, 3], [0, 2, 4]]
    assert rows.of_group.tolist() == [1, 0, 1, 0, 1]


def test_shares_say_how_often_a_step_is_read():
    shares = torch.tensor([0.6, 0.4, 0.0, 0.0, 0.0])
    assert table_rows(torch.tensor([]), STEPS, shares).positions.tolist() == [[0, 0, 0, 1, 1]]
    # a class that has no share at all still needs a row
    assert table_rows(torch.tensor([400.0]), STEPS, shares).positions[0].tolist() == [3, 3, 4]
    assert spread(torch.tensor([4, 9]), torch.tensor([1.0, 3.0]), 4).tolist() == [4, 9, 9, 9]
