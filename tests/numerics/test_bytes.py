"""Bytes of codes against a loop over whole numbers of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcaq.numerics import bytes as way
from tcaq.numerics.bytes import byte_codes, signed_bytes

UNITS = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


@given(st.lists(UNITS, min_size=1, max_size=40), st.integers(0, 255), st.integers(3, 255))
def test_bytes_are_clamped_whole_numbers(units, zero_point, top):
    found = byte_codes(torch.tensor(units), zero_point, top)
    assert found.dtype == torch.uint8
    assert found.tolist() == [min(max(round(u) + zero_point, 0), top) for u in units]


def test_halves_go_to_the_even_number():
    assert byte_codes(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), 4, 255).tolist() == [2, 4, 4, 6, 6]


@pytest.mark.parametrize("channels_last", [False, True])
def test_each_row_has_its_zero_point_and_the_order_in_memory_stays(channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    units = (300 * torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))).to(memory_format=form)
    zero_points = torch.tensor([0.0, 7.0, 128.0, 255.0]).reshape(4, 1, 1, 1)
    expected = (units.double().round() + zero_points).clamp(0, 200)
    found = byte_codes(units.clone(), zero_points, 200)
    assert torch.equal(found.double(), expected)
    assert found.is_contiguous(memory_format=form)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("top", [15, 255])
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_both_ways_give_the_same_bytes(zero_point, top, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    halves = torch.arange(-1200, 1200).reshape(4, 6, 10, 10) / 2
    halves[0, 0, 0, :4] = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38])
    assert way._quantizes()
    whole = halves.to(memory_format=form).round_()
    one, other = (f(whole.clone(), zero_point, top) for f in (way._in_one_pass, way._by_signed_bytes))
    assert torch.equal(one, other)
    assert one.stride() == other.stride()


@given(st.lists(UNITS, min_size=1, max_size=40), st.integers(-128, 127), st.integers(-128, 0), st.integers(0, 127))
def test_signed_bytes_are_clamped_whole_numbers(units, zero_point, low, high):
    expected = [min(max(round(u) + zero_point, low), high) for u in units]
    quantized = way._quantizes
    for whether in (quantized, lambda: False):
        way._quantizes = whether
        try:
            found = signed_bytes(torch.tensor(units), zero_point, low, high)
        finally:
            way._quantizes = quantized
        assert found.dtype == torch.int8
        assert found.tolist() == expected


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (3, 1, 0, 2)])
def test_what_is_turned_over_stays_so(order):
    units = (300 * torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))).permute(order)
    expected = (units.double().round() + 7).clamp(0, 255)
    found = byte_codes(units.clone(), 7, 255)
    assert torch.equal(found.double(), expected)
    assert found.stride() == units.stride()


def test_a_pytorch_that_quantizes_no_tensors_is_no_obstacle(monkeypatch):
    monkeypatch.delattr(torch, "quantize_per_tensor")
    way._quantizes.cache_clear()
    try:
        assert byte_codes(torch.tensor([-1.5, 0.5, 300.0]), 4, 200).tolist() == [2, 4, 200]
        assert not way._quantizes()
    finally:
        way._quantizes.cache_clear()
