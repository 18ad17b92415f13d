"""Log2 grids against a loop over Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from tcaq.numerics.log2 import dequantize_log2, fake_quantize_log2, quantize_log2

BITS = range(2, 9)


def naive(p: float, peak: float, bits: int, per_octave: int = 1) -> float:
    """One value through the definition, in double precision."""
    last = 2**bits - 1
    if p == 0.0:
        return 0.0
    code = min(max(round(-per_octave * math.log2(p / peak)), 0), last)
    return 0.0 if code == last else peak * 2.0 ** (-code / per_octave)


@pytest.mark.parametrize("bits", BITS)
def test_powers_of_two_are_fixed_points_until_the_zero_code(bits: int) -> None:
    last = 2**bits - 1
    codes = torch.arange(min(last, 120)).float()  # beyond 2^-126 float32 loses precision
    for peak in (1.0, 0.75):
        scale = torch.tensor(peak)
        values = dequantize_log2(codes, scale, bits)
        torch.testing.assert_close(values.double(), peak * 2.0 ** -codes.double(), rtol=1e-6, atol=0)
        assert torch.equal(quantize_log2(values, scale, bits), codes)
        assert torch.equal(fake_quantize_log2(values, scale, bits), values)
    assert dequantize_log2(torch.tensor(float(last)), torch.tensor(1.0), bits) == 0.0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("peak", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("per_octave", [1, 2, 5])
def test_values_equal_the_float_loop(bits: int, peak: float, per_octave: int) -> None:
    torch.manual_seed(0)
    p = torch.softmax(4 * torch.randn(40, 50), dim=-1).flatten()
    exponent = -per_octave * torch.log2(p.double() / peak)
    p = p[((exponent - exponent.floor() - 0.5).abs() > 1e-4)]  # a tie in double is none in single precision
    expected = torch.tensor([naive(v, peak, bits, per_octave) for v in p.tolist()], dtype=torch.float64)
    actual = fake_quantize_log2(p, torch.tensor(peak), bits, per_octave)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zero_is_zero_and_values_above_the_peak_are_the_peak(bits: int) -> None:
    p = torch.tensor([0.0, 1e-45, 0.5, 0.9, 1.0])
    peak = torch.tensor(0.25)
    hat = fake_quantize_log2(p, peak, bits)
    assert hat[0] == 0.0
    assert hat[1] <= 1e-44
    assert hat[2:].tolist() == [0.25] * 3


def test_scales_broadcast_and_gradients_pass_without_changing_values() -> None:
    torch.manual_seed(0)
    p = torch.rand(4, 3, 5, requires_grad=True)
    peak = torch.tensor([1.0, 0.5, 0.25, 0.1]).reshape(4, 1, 1)
    hat = fake_quantize_log2(p, peak, 3)
    for row, scale in enumerate(peak.flatten()):
        assert torch.equal(hat[row], fake_quantize_log2(p[row].detach(), scale, 3))
    upstream = torch.randn(hat.shape)
    (hat * upstream).sum().backward()
    assert p.grad is not None
    assert torch.equal(p.grad, upstream)
