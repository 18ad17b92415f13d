"""Affine grids against a float loop, the closed form of LSQ, and autograd of straight-through operations."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcaq.errors import UsageError
from tcaq.numerics.affine import code_range, dequantize, fake_quantize, qparams, quantize

GRIDS = list(itertools.product(range(2, 9), (False, True), (False, True)))  # bits, signed, symmetric


def naive(values: list[float], scale: float, zero_point: int, low: int, high: int) -> list[int]:
    """Codes by a loop over Python floats; Python rounds ties to even."""
    return [min(max(round(value / scale) + zero_point, low), high) for value in values]


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_outside_two_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"{bits} bits were asked for; a grid has 2 to 8 bits"):
        code_range(bits, signed=False)


def test_code_ranges() -> None:
    for bits in range(2, 9):
        assert code_range(bits, signed=False) == (0, 2**bits - 1)
        assert code_range(bits, signed=True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.sampled_from(GRIDS),
    ends=st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)),
)
def test_ranges_are_covered_and_hold_zero(grid: tuple[int, bool, bool], ends: tuple[float, float]) -> None:
    bits, signed, symmetric = grid
    low, high = torch.tensor(min(ends)), torch.tensor(max(ends))
    scale, zero = qparams(low, high, bits, signed, symmetric)
    code_low, code_high = code_range(bits, signed)
    assert scale > 0
    assert zero == zero.round()
    assert code_low <= zero <= code_high
    assert fake_quantize(torch.zeros(1), scale, zero, code_low, code_high) == 0.0
    # whatever the range holds is at most half a step away from its grid value
    x = torch.linspace(min(float(low), 0.0), max(float(high), 0.0), 101)
    hat = fake_quantize(x, scale, zero, code_low, code_high)
    assert ((x - hat).abs() <= scale / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(("bits", "signed", "symmetric"), GRIDS)
def test_codes_equal_the_float_loop_and_grid_values_are_fixed_points(bits: int, signed: bool, symmetric: bool) -> None:
    torch.manual_seed(0)
    code_low, code_high = code_range(bits, signed)
    scale, zero = qparams(torch.tensor(-0.7), torch.tensor(1.9), bits, signed, symmetric)
    scale = torch.tensor(2.0 ** round(float(scale.log2())))  # exact quotients, so that ties are ties in both
    ties = (torch.arange(-2 * code_high, 2 * code_high) + 0.5) * scale
    x = torch.cat([torch.randn(500), ties, torch.tensor([-1e6, 1e6, 0.0])])
    codes = quantize(x, scale, zero, code_low, code_high)
    assert codes.tolist() == naive(x.tolist(), float(scale), int(zero), code_low, code_high)
    hat = fake_quantize(x, scale, zero, code_low, code_high)
    assert hat.tolist() == [(code - int(zero)) * float(scale) for code in codes.tolist()]
    every = torch.arange(code_low, code_high + 1).float()
    grid = dequantize(every, scale, zero)
    assert torch.equal(quantize(grid, scale, zero, code_low, code_high), every)
    assert torch.equal(fake_quantize(grid, scale, zero, code_low, code_high), grid)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.5, 3.0), (0.0, 3.0), (-3.0, -0.5), (-3.0, 0.0), (-1.0, 2.0)])
def test_asymmetric_ranges_use_every_code(bits: int, signed: bool, low: float, high: float) -> None:
    code_low, code_high = code_range(bits, signed)
    scale, zero = qparams(torch.tensor(low), torch.tensor(high), bits, signed, symmetric=False)
    assert float(scale) == pytest.approx((max(high, 0.0) - min(low, 0.0)) / (2**bits - 1))
    x = torch.linspace(min(low, 0.0), max(high, 0.0), 5000)
    assert quantize(x, scale, zero, code_low, code_high).unique().tolist() == list(range(code_low, code_high + 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_grids_are_centred_and_reach_the_larger_end(bits: int) -> None:
    low, high = torch.tensor([-3.0, -1.0, 0.0]), torch.tensor([1.0, 3.0, 3.0])
    scale, zero = qparams(low, high, bits, signed=True, symmetric=True)
    assert zero.tolist() == [0.0] * 3
    torch.testing.assert_close(scale, torch.full((3,), 3.0 / (2 ** (bits - 1) - 1)))
    scale, zero = qparams(low, high, bits, signed=False, symmetric=True)
    middle = 2 ** (bits - 1)
    assert zero.tolist() == [middle, middle, 0.0]  # the one-sided range starts at zero and wastes no code
    torch.testing.assert_close(scale, 3.0 / torch.tensor([middle - 1.0, middle - 1.0, 2.0**bits - 1]))


@pytest.mark.parametrize(("bits", "signed", "symmetric"), GRIDS)
def test_degenerate_ranges_stay_finite(bits: int, signed: bool, symmetric: bool) -> None:
    code_low, code_high = code_range(bits, signed)
    low = torch.tensor([0.0, 5.0, -5.0, -1e-42, 0.0])
    high = torch.tensor([0.0, 5.0, -5.0, 1e-42, 1e-42])
    scale, zero = qparams(low, high, bits, signed, symmetric)
    assert (torch.isfinite(scale) & (scale > 0)).all()
    x = torch.tensor([0.0, -1e30, 1e30, 5.0]).unsqueeze(1).requires_grad_()
    scale.requires_grad_()
    hat = fake_quantize(x, scale, zero, code_low, code_high)
    hat.sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    for tensor in (hat, x.grad, scale.grad):
        assert torch.isfinite(tensor).all()
    assert hat[0].tolist() == [0.0] * 5
    # a constant is a grid value, unless a symmetric unsigned grid gives the negative side its own step
    if not symmetric:
        torch.testing.assert_close(hat[3, 1], torch.tensor(5.0))


class Round(torch.autograd.Function):
    """Rounding whose gradient is 1."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def composed(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """The same function out of plain operations, differentiated by autograd."""
    return (torch.clamp(Round.apply(x / scale) + zero_point, low, high) - zero_point) * scale


@pytest.mark.parametrize("shape", [(1,), (3, 1, 1, 1), (3, 4, 1, 1)])
@pytest.mark.parametrize(("bits", "signed", "symmetric"), [(2, False, False), (4, True, True), (5, False, True)])
def test_gradients_equal_autograd_and_values_need_no_gradient(
    shape: tuple[int, ...], bits: int, signed: bool, symmetric: bool
) -> None:
    torch.manual_seed(1)
    code_low, code_high = code_range(bits, signed)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    _, zero = qparams(-torch.rand(shape), torch.rand(shape), bits, signed, symmetric)
    zero = zero.double()
    scale = (0.05 + 0.2 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64)
    results = []
    for function in (fake_quantize, composed):
        hat = function(x, scale, zero, code_low, code_high)
        results.append((hat.detach(), *torch.autograd.grad((hat * upstream).sum(), (x, scale))))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert results[0][2].shape == shape
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, scale, zero, code_low, code_high), results[0][0])
    assert torch.equal(fake_quantize(x.detach(), scale.detach(), zero, code_low, code_high), results[0][0])


def test_gradients_equal_the_closed_form_of_lsq() -> None:
    # signed 3 bits: codes -4..3, step 0.5; values below, inside, and above
    x = torch.tensor([-5.0, -0.6, 0.1, 0.85, 5.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    hat = fake_quantize(x, scale, torch.tensor(0.0), -4, 3)
    assert hat.tolist() == [-2.0, -0.5, 0.0, 1.0, 1.5]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    (hat * weights).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0, 0.0]
    slopes = [-4.0, -1 + 1.2, 0 - 0.2, 2 - 1.7, 3.0]
    assert float(scale.grad) == pytest.approx(sum(s * w for s, w in zip(slopes, weights.tolist(), strict=True)))
