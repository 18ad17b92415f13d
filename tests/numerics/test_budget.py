"""The choice under a budget against all choices there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq.errors import NumericalError
from tcaq.numerics.budget import cheapest

WIDTHS = torch.tensor([2, 3, 5])


def brute_force(costs: torch.Tensor, sizes: torch.Tensor, budget: int) -> float:
    choices = (torch.tensor(choice) for choice in product(range(len(WIDTHS)), repeat=len(sizes)))
    return min(total(costs, choice) for choice in choices if int((sizes * WIDTHS[choice]).sum()) <= budget)


def total(costs: torch.Tensor, choice: torch.Tensor) -> float:
    return float(costs.gather(1, choice[:, None]).sum())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(1e-3, 1.0), min_size=3, max_size=3)), min_size=1, max_size=5),
    st.floats(0.0, 1.0),
)  # fmt: skip
def test_no_choice_within_the_budget_costs_less(layers, generosity):
    sizes = torch.tensor([size for size, _ in layers])
    costs = torch.tensor([row for _, row in layers], dtype=torch.float64)
    least, most = int(sizes.sum()) * 2, int(sizes.sum()) * 5
    budget = least + int(generosity * (most - least))
    chosen = cheapest(costs, sizes, WIDTHS, budget)
    assert int((sizes * WIDTHS[chosen]).sum()) <= budget
    assert total(costs, chosen) <= brute_force(costs, sizes, budget) * (1 + 1e-3) + 1e-6


def test_costs_that_span_orders_of_magnitude_are_told_apart():
    """A layer of ten million times as much leaves the others' choice as it is without them."""
    fine = torch.tensor([[3e-7, 2e-7, 1e-7], [9e-7, 5e-7, 1e-7]], dtype=torch.float64)
    loud = torch.tensor([[4.0, 2.0, 1.0]], dtype=torch.float64)
    sizes = torch.tensor([10, 10, 10])
    assert WIDTHS[cheapest(torch.cat([loud, fine]), sizes, WIDTHS, 10 * (5 + 2 + 5))].tolist() == [5, 2, 5]


def test_a_budget_of_more_units_than_are_told_apart_is_kept_and_used():
    """Sizes without a common divisor: needs are rounded up to a hundred-thousandth of the budget."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10**6, 10**8, (40,), generator=generator) * 2 + 1
    amplitudes = torch.randn(40, generator=generator, dtype=torch.float64).mul(3).exp()
    costs = amplitudes[:, None] * 4.0 ** -WIDTHS.double()
    budget = int(sizes.sum()) * 3
    chosen = cheapest(costs, sizes, WIDTHS, budget)
    spent = int((sizes * WIDTHS[chosen]).sum())
    assert 0.99 * budget < spent <= budget
    assert total(costs, chosen) < 0.5 * total(costs, torch.ones(40, dtype=torch.int64))  # all at 3 bits fit as well


def test_a_budget_below_the_narrowest_is_refused():
    with pytest.raises(NumericalError, match="narrowest widths take 20 bits, the budget is 19"):
        cheapest(torch.ones(1, 3, dtype=torch.float64), torch.tensor([10]), WIDTHS, 19)


def test_costs_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match="not finite"):
        cheapest(torch.full((1, 3), float("nan"), dtype=torch.float64), torch.tensor([1]), WIDTHS, 9)
