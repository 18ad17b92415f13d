"""The TCR vector against a loop over its formula, and the noise that is predicted against rounding."""

from __future__ import annotations

import pytest
import torch

from tcaq.numerics.affine import code_range, fake_quantize, qparams
from tcaq.numerics.equalize import predicted_noise, shared_worth, tcr_vector


def looped(maxima: list[list[float]], truncate: float) -> list[float]:
    """r with the paper's per-step minimum as target, in Python floats."""
    joint = []
    for c in range(len(maxima[0])):
        above = sum(m[c] * max(m[c] / min(m), 1.0) for m in maxima)
        joint.append(min(max(above / sum(m[c] for m in maxima), 1.0), truncate))
    return joint


@pytest.mark.parametrize("truncate", [2.0, 10.0, 1e9])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_percentile_zero_is_the_papers_formula(steps: int, truncate: float, strength: float) -> None:
    torch.manual_seed(0)
    maxima = torch.rand(steps, 9).double().pow(3) + 0.01
    expected = torch.tensor(looped(maxima.tolist(), truncate), dtype=torch.float64).pow(strength)
    actual = tcr_vector(maxima, percentile=0.0, truncate=truncate, strength=strength)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


def test_a_single_step_divides_by_its_smallest_channel() -> None:
    r = tcr_vector(torch.tensor([[2.0, 1.0, 8.0]]), percentile=0.0, truncate=100.0)
    assert r.tolist() == [2.0, 1.0, 8.0]
    assert tcr_vector(torch.tensor([[2.0, 1.0, 8.0]]), percentile=0.5, truncate=100.0).tolist() == [1.0, 1.0, 4.0]


def test_steps_with_large_ranges_count_more() -> None:
    maxima = torch.tensor([[1.0, 10.0], [1.0, 1.0]])  # channel 1: ratios 10 and 1, weights 10 and 1
    assert tcr_vector(maxima, percentile=0.0, truncate=100.0)[1].item() == pytest.approx((10 * 10 + 1) / 11)


def test_dead_channels_keep_one_and_explode_nothing_at_a_percentile() -> None:
    torch.manual_seed(0)
    maxima = 1.0 + torch.rand(5, 20)
    maxima[:, 3] = 0.0
    r = tcr_vector(maxima, percentile=0.1, truncate=1e9)
    assert r[3] == 1.0
    assert (r < 3).all()
    cut = tcr_vector(maxima, percentile=0.0, truncate=10.0)  # the minimum is the dead channel: truncation must hold
    assert cut[3] == 1.0
    assert torch.equal(cut[torch.arange(20) != 3], torch.full((19,), 10.0))


@pytest.mark.parametrize("maxima", [torch.zeros(4, 6), torch.ones(4, 6), torch.full((4, 6), 1e-20)])
def test_nothing_to_equalize_gives_ones(maxima: torch.Tensor) -> None:
    assert torch.equal(tcr_vector(maxima, percentile=0.05, truncate=10.0), torch.ones(6))


def test_strength_zero_gives_ones() -> None:
    torch.manual_seed(0)
    assert torch.equal(tcr_vector(torch.rand(4, 6), percentile=0.0, truncate=10.0, strength=0.0), torch.ones(6))


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(8, 8), (4, 8), (8, 4), (5, 6)])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_predicted_noise_is_what_rounding_adds(weight_bits: int, input_bits: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(weight_bits * 10 + input_bits)
    weight = torch.randn(24, 12, 3, generator=generator)
    spread = torch.logspace(-1, 1, 12).reshape(12, 1)
    steps = [torch.randn(12, 4096 * 3, generator=generator) * spread * size for size in (0.5, 2.0)]
    low, high = (torch.stack([end(x, dim=1) for x in steps]) for end in (torch.amin, torch.amax))
    squares = torch.stack([x.square().mean(1) for x in steps])
    r = tcr_vector(torch.maximum(-low, high), percentile=0.0, truncate=1e4, strength=strength)

    scaled = (weight * r[:, None]).flatten(1)
    grid = qparams(scaled.amin(1), scaled.amax(1), weight_bits, signed=False, symmetric=False)
    rounded = fake_quantize(scaled, *(row[:, None] for row in grid), *code_range(weight_bits, signed=False))
    rounded = (rounded.reshape(weight.shape) / r[:, None]).flatten(1).double()
    measured = 0.0
    for x in steps:
        divided = x / r[:, None]
        scale, zero = qparams(divided.min(), divided.max(), input_bits, signed=False, symmetric=False)
        seen = fake_quantize(divided, scale, zero, *code_range(input_bits, signed=False)) * r[:, None]
        # each output channel sums over channels and three taps, whose inputs are separate draws
        taps, real = (y.reshape(12, 4096, 3).movedim(2, 1).flatten(0, 1).double() for y in (seen, x))
        error = rounded @ taps - weight.flatten(1).double() @ real
        measured += float(error.square().mean(1).sum()) / len(steps)

    worth = shared_worth(low, high, r, input_bits)
    found = predicted_noise(weight, r, worth, squares, weight_bits=weight_bits)
    assert found == pytest.approx(measured, rel=0.15)
