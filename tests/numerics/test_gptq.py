"""GPTQ against optimal brain quantization solved anew for every column, and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq.errors import NumericalError
from tcaq.numerics.affine import code_range, dequantize, qparams, quantize
from tcaq.numerics.gptq import feedback, gptq_codes


def problem(seed: int, out: int, columns: int, bits: int, correlation: float = 0.9):
    """Weight, inputs [samples, columns] that go together, and a grid that clips a little."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    common = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    mixing = torch.randn(2, columns, generator=generator, dtype=torch.float64)
    own = torch.randn(200, columns, generator=generator, dtype=torch.float64)
    inputs = correlation * common @ mixing + (1 - correlation) * own
    scale, zero_point = qparams(0.8 * weight.amin(1), 0.8 * weight.amax(1), bits, False, False)
    return weight, inputs, scale.double(), zero_point.double(), *code_range(bits, False)


def solved_anew(weight, hessian, scale, zero_point, low, high, damping):
    """Column by column: round it, then move the float columns behind it to the least-squares optimum, each time by a solve."""
    count = len(hessian)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(count, dtype=hessian.dtype)
    order = sorted(range(count), key=lambda j: -float(hessian[j, j]))
    codes = torch.zeros_like(weight)
    for row in range(len(weight)):
        left = weight[row].clone()
        for position, j in enumerate(order):
            codes[row, j] = min(max(torch.round(left[j] / scale[row]) + zero_point[row], low), high)
            error = left[j] - (codes[row, j] - zero_point[row]) * scale[row]
            later = order[position + 1 :]
            if later:
                left[later] += error * torch.linalg.solve(damped[later][:, later], damped[later, j])
    return codes


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 12), st.sampled_from([1, 3, 128]))
def test_equals_a_least_squares_solve_for_every_column(seed, bits, columns, block):
    weight, inputs, scale, zero_point, low, high = problem(seed, 3, columns, bits)
    hessian = inputs.T @ inputs
    expected = solved_anew(weight, hessian, scale, zero_point, low, high, 0.01)
    actual = gptq_codes(weight, hessian, scale, zero_point, low, high, damping=0.01, block=block)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errs_less_in_products_than_rounding_to_nearest_and_more_in_weights(bits):
    weight, inputs, scale, zero_point, low, high = problem(0, 16, 64, bits)
    rows, zeros = scale[:, None], zero_point[:, None]
    nearest = quantize(weight, rows, zeros, low, high)
    codes = gptq_codes(weight, inputs.T @ inputs, scale, zero_point, low, high)
    assert float(codes.min()) >= low
    assert float(codes.max()) <= high
    errors = [weight - dequantize(found, rows, zeros) for found in (codes, nearest)]
    products = [float((error @ inputs.T).square().sum()) for error in errors]
    assert products[0] < 0.2 * products[1]
    assert float(errors[0].square().sum()) > float(errors[1].square().sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_under_a_diagonal_hessian_every_weight_goes_to_its_nearest_code(seed, bits):
    weight, inputs, scale, zero_point, low, high = problem(seed, 4, 9, bits)
    energies = inputs.square().sum(0)
    energies[3] = 0.0  # an input that is never there
    codes = gptq_codes(weight, torch.diag(energies), scale, zero_point, low, high)
    assert torch.equal(codes, quantize(weight, scale[:, None], zero_point[:, None], low, high))


def test_inputs_that_are_never_there_change_nothing():
    weight, inputs, scale, zero_point, low, high = problem(1, 4, 10, 3)
    inputs[:, [2, 7]] = 0.0
    there = [j for j in range(10) if j not in (2, 7)]
    whole, part = (
        gptq_codes(w, x.T @ x, scale, zero_point, low, high, damping=0.0)
        for w, x in ((weight, inputs), (weight[:, there], inputs[:, there]))
    )
    assert torch.equal(whole[:, there], part)
    assert torch.equal(whole[:, 2], quantize(weight[:, 2], scale, zero_point, low, high))


def test_the_factor_is_that_of_the_inverse():
    inputs = problem(2, 1, 12, 4)[1]
    factor = feedback(inputs.T @ inputs, 0.05)
    damped = inputs.T @ inputs
    damped += 0.05 * damped.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped))


def test_a_hessian_that_is_none_is_refused():
    weight, _, scale, zero_point, low, high = problem(3, 2, 2, 4)
    with pytest.raises(NumericalError, match=r"2 inputs is not positive definite; raise `gptq.damping`, which is 0.01"):
        gptq_codes(weight, torch.tensor([[1.0, 3.0], [3.0, 1.0]]), scale, zero_point, low, high)
    with pytest.raises(NumericalError, match="not positive definite"):
        gptq_codes(weight, torch.full((2, 2), float("nan")), scale, zero_point, low, high)
