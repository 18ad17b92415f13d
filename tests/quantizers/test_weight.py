"""Packed weights, and AdaRound's way from a weight to codes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tcaq.errors import NumericalError
from tcaq.numerics.affine import qparams
from tcaq.quantizers.weight import WeightQuantizer
from tcaq.spec.grid import AffineGrid

GRIDS = [
    AffineGrid(bits=bits, signed=signed, symmetric=symmetric)
    for bits, signed, symmetric in itertools.product(range(2, 9), (False, True), (False, True))
]


def made(grid: AffineGrid, shape: tuple[int, ...] = (5, 3, 3, 3)) -> tuple[WeightQuantizer, Tensor, Tensor, Tensor]:
    """A quantizer with searched rows, its weight, scale and zero point shaped to broadcast."""
    torch.manual_seed(grid.bits)
    weight = torch.randn(shape)
    flat = weight.flatten(1)
    scale, zero = qparams(0.8 * flat.amin(1), 0.8 * flat.amax(1), grid.bits, grid.signed, grid.symmetric)
    quantizer = WeightQuantizer(grid, weight.shape)
    quantizer.set_rows(scale, zero, weight)
    rows = (-1, *[1] * (len(shape) - 1))
    return quantizer, weight, scale.reshape(rows), zero.reshape(rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (7, 11)])
def test_codes_round_trip_and_are_the_nearest(grid: AffineGrid, shape: tuple[int, ...]) -> None:
    quantizer, weight, scale, zero = made(grid, shape)
    expected = (torch.round(weight / scale) + zero).clamp(quantizer.low, quantizer.high)
    assert torch.equal(quantizer.integers().float(), expected)
    assert torch.equal(quantizer(), (expected - zero) * scale)
    assert quantizer.codes.numel() == -(-weight.numel() * grid.bits // 8)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learned_roundings_become_codes(grid: AffineGrid) -> None:
    quantizer, weight, scale, zero = made(grid)
    before = quantizer.codes.clone()
    (alpha,) = quantizer.begin_learning(weight, trust=0.0)
    low, high = (quantizer.low - zero) * scale, (quantizer.high - zero) * scale
    torch.testing.assert_close(quantizer(weight), weight.clamp(low, high), rtol=1e-5, atol=1e-5)
    assert quantizer.penalty(2.0) > 0
    quantizer(weight).square().sum().backward()
    assert alpha.grad is not None
    assert (alpha.grad != 0).any()
    up = torch.rand(weight.shape) < 0.5
    with torch.no_grad():
        alpha.copy_(torch.where(up, 5.0, -5.0))
    soft = quantizer(weight).detach()
    assert quantizer.penalty(2.0) == 0.0
    quantizer.end_learning(weight)
    expected = (torch.floor(weight / scale) + up.float() + zero).clamp(quantizer.low, quantizer.high)
    assert torch.equal(quantizer.integers().float(), expected)
    assert torch.equal(quantizer(), soft)
    assert not torch.equal(quantizer.codes, before)
    assert list(quantizer.parameters()) == []
    assert quantizer.penalty(2.0) == 0.0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("trust", [0.5, 1.0])
def test_trusted_codes_survive_learning_that_changes_nothing(grid: AffineGrid, trust: float) -> None:
    quantizer, weight, _, _ = made(grid)
    quantizer.begin_learning(weight, trust=0.0)
    assert quantizer.alpha is not None
    with torch.no_grad():
        quantizer.alpha.copy_(torch.randn(weight.shape))  # decisions other than the nearest
    quantizer.end_learning(weight)
    before = quantizer.codes.clone()
    quantizer.begin_learning(weight, trust)
    quantizer.end_learning(weight)
    assert torch.equal(quantizer.codes, before)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_beyond_the_neighbours_count_as_the_neighbour_on_their_side(grid: AffineGrid) -> None:
    quantizer, weight, scale, zero = made(grid)
    below = torch.floor(weight / scale) + zero
    found = (below + torch.randint(-3, 5, weight.shape)).clamp(quantizer.low, quantizer.high)
    quantizer.set_integers(found)
    assert torch.equal(quantizer.integers().float(), found)
    quantizer.begin_learning(weight, trust=0.8)
    quantizer.end_learning(weight)
    expected = found.maximum(below).minimum(below + 1).clamp(quantizer.low, quantizer.high)
    assert torch.equal(quantizer.integers().float(), expected)


@pytest.mark.parametrize("grid", [AffineGrid(bits=8), AffineGrid(bits=8, signed=True), AffineGrid(bits=3)], ids=str)
@pytest.mark.parametrize("wrong", [300.0, -129.0, float("nan")])
def test_codes_that_do_not_fit_are_refused(grid: AffineGrid, wrong: float) -> None:
    quantizer, weight, _, _ = made(grid)
    before = quantizer.codes.clone()
    codes = torch.zeros_like(weight)
    codes[1, 0, 2, 1] = wrong
    with pytest.raises(NumericalError, match=rf"codes from {quantizer.low} to {quantizer.high}"):
        quantizer.set_integers(codes)
    assert torch.equal(quantizer.codes, before)


@pytest.mark.parametrize("grid", [AffineGrid(bits=3), AffineGrid(bits=8, signed=True)], ids=str)
def test_the_state_round_trips_strictly(grid: AffineGrid) -> None:
    quantizer, weight, _, _ = made(grid)
    fresh = WeightQuantizer(grid, weight.shape)
    state = quantizer.state_dict()
    assert {name: value.dtype for name, value in state.items()} == {
        "codes": torch.uint8, "scale": torch.float32, "zero_point": torch.int16,
    }  # fmt: skip
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh(), quantizer())
