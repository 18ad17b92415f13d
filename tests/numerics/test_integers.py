"""Whole numbers in parts, put together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq.numerics.integers import signed_codes


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_every_form_holds_the_same_numbers(bits: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (5, 3, 2, 2), generator=draw, dtype=torch.int16)
    zero = torch.randint(0, 2**bits, (5,), generator=draw, dtype=torch.int16)
    zero[0], zero[-1] = 0, 2**bits - 1  # one-sided weights
    n = codes - zero.reshape(-1, 1, 1, 1)
    whole, careful = signed_codes(n)
    for form in (whole, careful):
        assert torch.equal(form.whole(), n)
        assert all(plane.dtype == torch.int8 for plane in form.planes)
        stored = torch.cat([plane.flatten() for plane in form.planes]).tolist()
        low, high = form.extremes
        assert low <= min(stored)
        assert max(stored) <= high
    assert max(abs(end) for end in careful.extremes) <= 64  # 2 * 64 * 255 is below 2^15
    assert len(whole.planes) == 1
    assert len(careful.planes) == (1 if int((n.flatten(1).amax(1) - n.flatten(1).amin(1)).max()) < 128 else 2)


@pytest.mark.parametrize(
    ("values", "has_rest"), [((-128, 127), False), ((-127, 128), True), ((-255, 0), True), ((0, 64), False)]
)
def test_a_summing_channel_is_asked_for_only_where_bytes_do_not_suffice(
    values: tuple[int, int], has_rest: bool
) -> None:
    whole = next(signed_codes(torch.tensor([[0, 1], list(values)], dtype=torch.int16)))
    assert whole.has_rest is has_rest
    assert whole.rest[0] == 0
