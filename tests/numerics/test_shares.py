"""Shares of steps against draws, and quotas against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq.numerics.shares import active, quotas, skewed_normal


@pytest.mark.parametrize("descending", [True, False])
def test_a_skewed_normal_gives_each_step_the_mass_of_the_draws_nearest_to_it(descending):
    timesteps = torch.linspace(0, 990, 34).round().flip(0) if descending else torch.tensor([5, 100, 101, 640, 999])
    generator = torch.Generator().manual_seed(0)
    draws = (0.4 * 999 + 0.4 * 999 * torch.randn(200_000, generator=generator)).clamp(0, 999)
    nearest = (draws[:, None] - timesteps[None]).abs().argmin(dim=1)
    expected = torch.bincount(nearest, minlength=len(timesteps)) / len(draws)
    torch.testing.assert_close(skewed_normal(timesteps, 999, 0.4, 0.4).float(), expected, atol=4e-3, rtol=0)


def test_without_a_price_the_most_telling_step_gets_everything():
    assert active(torch.tensor([1.0, 3.0, 2.0]), 5, 0.0).tolist() == [0, 5, 0]


def test_each_visit_lowers_a_step():
    # 3.0 | 2.9, 1.0 | 1.0, 0.9 ...: taken by hand
    assert active(torch.tensor([1.0, 3.0, 2.9]), 4, 2.0).tolist() == [1, 2, 1]


def test_quotas_by_hand():
    assert quotas(torch.tensor([0.5, 0.3, 0.2]), 7, 10).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert quotas(torch.ones(4), 6, 10).tolist() == [2, 2, 1, 1]
    assert quotas(torch.tensor([8.0, 1.0, 1.0]), 9, 3).tolist() == [3, 3, 3]
    assert quotas(torch.tensor([1.0, 0.0]), 9, 3).tolist() == [3, 0]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12).filter(any), st.integers(0, 60), st.integers(1, 9))
def test_quotas_add_up_and_keep_their_limits(shares, total, most):
    weights = torch.tensor(shares, dtype=torch.float64)
    found = quotas(weights, total, most)
    assert int(found.sum()) == min(total, most * int((weights > 0).sum()))
    assert bool(((found >= 0) & (found <= most)).all())
    assert not bool(found[weights == 0].any())


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12), st.integers(0, 60))
def test_without_a_limit_a_quota_is_its_share_rounded(shares, total):
    weights = torch.tensor(shares, dtype=torch.float64)
    exact = weights / weights.sum() * total
    assert bool(((quotas(weights, total, total or 1) - exact).abs() < 1 + 1e-9).all())
