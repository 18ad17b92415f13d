"""Quantizers whose width changes by step group, against quantizers of one width each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import (
    MixedProbabilityQuantizer,
    MixedQuantizer,
    affine_quantizer,
    probability_quantizer,
    row_widths,
    set_widths,
)
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Log2Grid, ProbabilityGrid, UnitGrid
from tcaq.spec.steps import StepGroups

TIMESTEPS, ROWS = torch.tensor([999, 0, 400, 0]), [2, 0, 1, 0]
BITS = torch.tensor([8, 3, 5])
SCALE = torch.tensor([0.01, 0.4, 0.1])


def clock() -> StepClock:
    made = StepClock(StepGroups(boundaries=(100.0, 700.0)))
    made.set(TIMESTEPS)
    return made


def affine(signed: bool) -> MixedQuantizer:
    quantizer = MixedQuantizer(AffineGrid(bits=3, wider=(5, 8), signed=signed), clock())
    set_widths(nn.ModuleList([quantizer]), BITS)
    quantizer.set_rows(SCALE, torch.tensor([-9.0, 1.0, -2.0]) if signed else torch.tensor([120.0, 3.0, 14.0]))
    return quantizer


def alone(quantizer: MixedQuantizer, row: int) -> AffineQuantizer:
    """The row as a quantizer of one width."""
    one = AffineQuantizer(quantizer.grid.at(int(BITS[row])), StepClock(StepGroups()))
    one.set_rows(quantizer.scale[row : row + 1], quantizer.zero_point[row : row + 1].float())
    return one


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("gained", [False, True])
def test_each_sample_has_the_range_of_its_row(signed: bool, gained: bool) -> None:
    torch.manual_seed(0)
    quantizer, x = affine(signed), 2 * torch.randn(4, 5, 6, 6)
    gain = torch.tensor([1.0, 2.0, 1.5, 9.0, 1.0]).reshape(1, 5, 1, 1) if gained else None
    expected = torch.cat([alone(quantizer, row)(x[i : i + 1], gain) for i, row in enumerate(ROWS)])
    assert torch.equal(quantizer(x, gain), expected)


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_one_width(signed: bool) -> None:
    torch.manual_seed(0)
    quantizer, x = affine(signed), (2 * torch.randn(4, 5)).requires_grad_()
    (gain,) = quantizer.begin_learning()
    quantizer(x).square().sum().backward()
    for i, row in ((0, 2), (2, 1)):  # rows of one sample each
        one, part = alone(quantizer, row), x.detach()[i : i + 1].clone().requires_grad_()
        (own,) = one.begin_learning()
        one(part).square().sum().backward()
        torch.testing.assert_close(x.grad[i : i + 1], part.grad)  # type: ignore[index]
        torch.testing.assert_close(gain.grad[quantizer._gain_of[row]], own.grad[0])  # type: ignore[index]


def test_limits_are_those_of_the_widths() -> None:
    low, high = affine(signed=True).limits
    assert (low.tolist(), high.tolist()) == ([-128, -4, -16], [127, 3, 15])
    low, high = affine(signed=False).limits
    assert (low.tolist(), high.tolist()) == ([0, 0, 0], [255, 7, 31])
    assert row_widths(affine(signed=False)).tolist() == BITS.tolist()
    assert row_widths(AffineQuantizer(AffineGrid(bits=6), clock())).tolist() == [6, 6, 6]


@pytest.mark.parametrize("grid", [UnitGrid(bits=3, wider=(5, 8)), Log2Grid(bits=3, wider=(5, 8)),
                                  AdaptiveGrid(bits=3, wider=(5, 8), per_octave=2)], ids=str)  # fmt: skip
def test_probabilities_have_the_grid_of_their_row(grid: ProbabilityGrid) -> None:
    torch.manual_seed(0)
    quantizer = MixedProbabilityQuantizer(grid, clock())
    set_widths(quantizer, BITS)
    scale, peak = torch.tensor([0.004, 0.15, 0.03]), torch.tensor([1.0, 0.5, 0.9])
    chosen = {"unit": [False] * 3, "log2": [True] * 3}.get(grid.code, [True, False, True])
    quantizer.set_rows(scale, peak, torch.tensor(chosen))
    p = torch.softmax(3 * torch.randn(4, 2, 6, 10), dim=-1)
    p[0, 0, 0, 0] = 0.0
    found = quantizer(p)
    for i, row in enumerate(ROWS):
        one = ProbabilityQuantizer(grid.at(int(BITS[row])), StepClock(StepGroups()))
        one.set_rows(scale[row : row + 1], peak[row : row + 1], torch.tensor(chosen[row : row + 1]))
        # of the whole batch: numbers at other places in memory are raised to a power by other instructions, and round otherwise
        assert torch.equal(found[i], one(p)[i])


def test_the_state_holds_the_widths_and_loads_strictly() -> None:
    quantizer, fresh = affine(signed=False), MixedQuantizer(AffineGrid(bits=3, wider=(5, 8)), clock())
    state = quantizer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "scale": torch.float32, "zero_point": torch.int16, "top": torch.int16
    }  # fmt: skip
    fresh.load_state_dict(state, strict=True)
    x = torch.randn(4, 5)
    assert torch.equal(fresh(x), quantizer(x))
    plain = AffineQuantizer(AffineGrid(bits=8), clock())
    with pytest.raises(RuntimeError, match="top"):
        plain.load_state_dict(state, strict=True)
    assert "top" in MixedProbabilityQuantizer(UnitGrid(bits=4, wider=(8,)), clock()).state_dict()


def test_a_grid_of_one_width_has_the_quantizer_that_it_always_had() -> None:
    assert type(affine_quantizer(AffineGrid(bits=4), clock())) is AffineQuantizer
    assert type(probability_quantizer(UnitGrid(bits=4), clock())) is ProbabilityQuantizer
    assert type(affine_quantizer(AffineGrid(bits=4, wider=(8,)), clock())) is MixedQuantizer


@torch.no_grad()
@pytest.mark.parametrize("kind", ["affine", "unit", "log2"])
def test_one_graph_serves_all_widths(kind: str) -> None:
    quantizer: nn.Module
    if kind == "affine":
        quantizer = affine(signed=False)
    else:
        quantizer = probability_quantizer((UnitGrid if kind == "unit" else Log2Grid)(bits=3, wider=(5, 8)), clock())
        set_widths(quantizer, BITS)
    x = torch.rand(4, 5)
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return module

    compiled = torch.compile(quantizer, backend=backend, fullgraph=True)
    for timesteps in (TIMESTEPS, torch.tensor([0, 0, 999, 400])):
        quantizer.clock.set(timesteps)  # type: ignore[operator, union-attr]
        assert torch.equal(compiled(x), quantizer(x))
    assert graphs == 1
