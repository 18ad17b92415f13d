"""The quantizer of probabilities: each group on its own grid."""

from __future__ import annotations

import pytest
import torch

from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.grid import AdaptiveGrid, Log2Grid, ProbabilityGrid, UnitGrid
from tcaq.spec.steps import StepGroups

ROWS = [2, 0, 1, 0]


def made(grid: ProbabilityGrid) -> ProbabilityQuantizer:
    clock = StepClock(StepGroups(boundaries=(100.0, 700.0)))
    clock.set(torch.tensor([999, 0, 400, 0]))
    return ProbabilityQuantizer(grid, clock)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("choice", [(True, False, True), (False, True, False), (True, True, True)])
def test_mixed_timesteps_equal_a_loop_over_samples(bits: int, choice: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    quantizer = made(AdaptiveGrid(bits=bits))
    scale, peak = torch.tensor([0.02, 0.05, 0.01]), torch.tensor([1.0, 0.5, 0.9])
    quantizer.set_rows(scale, peak, torch.tensor(choice))
    p = torch.softmax(3 * torch.randn(4, 2, 6, 10), dim=-1)
    actual = quantizer(p)
    for i, row in enumerate(ROWS):
        log2 = fake_quantize_log2(p[i], peak[row], bits)
        even = fake_quantize(p[i], scale[row], torch.tensor(0.0), 0, 2**bits - 1)
        assert torch.equal(actual[i], log2 if choice[row] else even)


def test_an_uncalibrated_grid_covers_zero_to_one() -> None:
    p = torch.linspace(0, 1, 40).reshape(1, -1).expand(4, -1)  # no ties at three bits
    even = made(UnitGrid(bits=3))(p)
    torch.testing.assert_close(even, (p * 7).round() / 7)
    assert torch.equal(made(AdaptiveGrid(bits=3))(p), even)
    assert torch.equal(made(Log2Grid(bits=3))(p), fake_quantize_log2(p, torch.tensor(1.0), 3))


@pytest.mark.parametrize("grid", [UnitGrid(bits=4), Log2Grid(bits=4), AdaptiveGrid(bits=4)])
def test_gradients_pass_and_dtypes_are_kept(grid: ProbabilityGrid) -> None:
    quantizer = made(grid)
    p = torch.softmax(torch.randn(4, 8), dim=-1).requires_grad_()
    quantizer(p).sum().backward()
    assert p.grad is not None
    assert torch.equal(p.grad, torch.ones_like(p))
    assert quantizer(p.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("grid", "other"), [(Log2Grid(bits=3), "_even"), (UnitGrid(bits=3), "_log2")], ids=str)
def test_a_fixed_grid_alone_is_computed_where_the_choice_may_not_be_read(grid, other, monkeypatch) -> None:
    monkeypatch.setattr(ProbabilityQuantizer, "_none", staticmethod(lambda _: False))  # another device, a traced graph
    monkeypatch.setattr(ProbabilityQuantizer, other, lambda *_: pytest.fail("the other grid was computed as well"))
    assert made(grid)(torch.rand(4, 8)).shape == (4, 8)


def test_the_state_round_trips_strictly() -> None:
    quantizer, fresh = made(AdaptiveGrid(bits=4)), made(AdaptiveGrid(bits=4))
    quantizer.set_rows(torch.rand(3), torch.rand(3), torch.tensor([True, False, True]))
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    for name in ("scale", "peak", "use_log2"):
        assert torch.equal(getattr(fresh, name), getattr(quantizer, name))
    assert set(quantizer.state_dict()) == {"scale", "peak", "use_log2"}
