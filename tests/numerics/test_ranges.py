"""The range search against a loop over rows and candidates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tcaq.numerics.affine import code_range, fake_quantize, qparams
from tcaq.numerics.ranges import search_range


def score(row: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, power: float, weights: Tensor) -> float:
    error = (fake_quantize(row, scale, zero, *code_range(bits, signed)) - row).abs().double().pow(power)
    return float((error * weights).mean())


def looped(
    row: Tensor, bits: int, signed: bool, symmetric: bool, power: float, candidates: int, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The best of all candidates for one row, one after another."""
    found = []
    for factor in torch.linspace(1.0, 0.2, candidates).tolist():
        scale, zero = qparams(row.min() * factor, row.max() * factor, bits, signed, symmetric)
        found.append((score(row, scale, zero, bits, signed, power, weights), scale, zero))
    _, scale, zero = min(found, key=lambda entry: entry[0])
    return scale, zero


CASES = [
    (2, True, True, 2.0),
    (4, False, False, 2.4),
    (4, True, True, 2.4),
    (3, False, True, 1.0),
    (8, True, False, 2.4),
]


def heavy_rows() -> Tensor:
    torch.manual_seed(3)
    rows = torch.distributions.StudentT(2.0).sample((6, 400))
    rows[1] = rows[1].abs()
    rows[2] = -rows[2].abs()
    rows[3] = 0.0
    rows[4] = 0.3
    return rows


@pytest.mark.parametrize(("bits", "signed", "symmetric", "power"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_search_equals_a_loop_over_rows(bits: int, signed: bool, symmetric: bool, power: float, weighted: bool) -> None:
    rows = heavy_rows()
    weights = torch.rand(rows.shape).pow(4) if weighted else torch.ones_like(rows)
    scale, zero = search_range(
        rows,
        bits,
        signed=signed,
        symmetric=symmetric,
        power=power,
        candidates=17,
        weights=weights if weighted else None,
    )
    for r, row in enumerate(rows):
        expected_scale, expected_zero = looped(row, bits, signed, symmetric, power, 17, weights[r])
        assert scale[r] == expected_scale
        assert zero[r] == expected_zero
    shared = weights[:1]
    scale, zero = search_range(
        rows, bits, signed=signed, symmetric=symmetric, power=power, candidates=17, weights=shared
    )
    assert scale[0] == looped(rows[0], bits, signed, symmetric, power, 17, shared[0])[0]


@pytest.mark.parametrize(("bits", "signed", "symmetric", "power"), CASES)
def test_search_never_scores_worse_than_min_max_which_one_candidate_is(
    bits: int, signed: bool, symmetric: bool, power: float
) -> None:
    rows = heavy_rows()
    options = {"signed": signed, "symmetric": symmetric, "power": power}
    scale, zero = search_range(rows, bits, candidates=30, **options)
    plain_scale, plain_zero = search_range(rows, bits, candidates=1, **options)
    expected = qparams(rows.amin(1), rows.amax(1), bits, signed, symmetric)
    assert torch.equal(plain_scale, expected[0])
    assert torch.equal(plain_zero, expected[1])
    ones = torch.ones(rows.shape[1])
    pairs = [
        [score(row, s[r], z[r], bits, signed, power, ones) for s, z in ((scale, zero), (plain_scale, plain_zero))]
        for r, row in enumerate(rows)
    ]
    assert all(searched <= plain * (1 + 1e-6) for searched, plain in pairs)
    if bits < 8:
        assert any(searched < 0.9 * plain for searched, plain in pairs)  # heavy tails: clipping pays


def test_rows_are_independent_and_the_search_is_not_differentiated() -> None:
    rows = heavy_rows().requires_grad_()
    options = {"signed": True, "symmetric": True, "power": 2.4, "candidates": 20}
    together = search_range(rows, 4, **options)
    assert not together[0].requires_grad
    for r in range(len(rows)):
        alone = search_range(rows[r : r + 1], 4, **options)
        assert torch.equal(alone[0], together[0][r : r + 1])
        assert torch.equal(alone[1], together[1][r : r + 1])
