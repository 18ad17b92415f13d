"""Packing against a loop over Python integers, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcaq.errors import UsageError
from tcaq.numerics.packing import pack, packed_length, unpack


def naive(codes: list[int], bits: int) -> list[int]:
    """The whole stream as one big integer."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


@st.composite
def coded(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


@settings(max_examples=300, deadline=None)
@given(coded())
def test_packs_like_the_bit_loop_and_unpacks_to_the_same_codes(case: tuple[list[int], int]) -> None:
    codes, bits = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == naive(codes, bits)
    assert packed.numel() == packed_length(len(codes), bits)
    back = unpack(packed, bits, tensor.shape)
    assert back.dtype == torch.uint8
    assert back.tolist() == codes


def test_known_bytes() -> None:
    assert pack(torch.tensor([0x1, 0xF, 0x3], dtype=torch.uint8), 4).tolist() == [0xF1, 0x03]
    assert pack(torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8), 2).tolist() == [0b10_01_00_11, 0b01]


@pytest.mark.parametrize("bits", range(1, 9))
def test_shape_and_order_survive(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape), codes)
    turned = codes.permute(2, 0, 1)  # not contiguous: row-major order of what the caller sees counts
    assert torch.equal(unpack(pack(turned, bits), bits, turned.shape), turned)


@pytest.mark.parametrize("shape", [(0,), (4, 0, 3), ()])
def test_empty_and_scalar(shape: tuple[int, ...]) -> None:
    codes = torch.ones(shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3), 3, shape), codes)


def test_result_does_not_alias_its_input() -> None:
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    packed = pack(codes, 8)
    back = unpack(packed, 8, [2])
    codes.zero_()
    assert packed.tolist() == [1, 2]
    packed.zero_()
    assert back.tolist() == [1, 2]


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_bits_outside_one_to_eight(bits: int) -> None:
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(UsageError, match=f"1 to 8 bits, got {bits}"):
        pack(codes, bits)
    with pytest.raises(UsageError, match=f"1 to 8 bits, got {bits}"):
        unpack(codes, bits, [4])


def test_code_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match="codes 0 to 7, got 8"):
        pack(torch.tensor([7, 8], dtype=torch.uint8), 3)


def test_wrong_dtype() -> None:
    with pytest.raises(UsageError, match="uint8, got int64"):
        pack(torch.tensor([1, 2]), 4)
    with pytest.raises(UsageError, match="got int8"):
        unpack(torch.zeros(1, dtype=torch.int8), 4, [2])


@pytest.mark.parametrize("length", [0, 2, 4])
def test_wrong_length(length: int) -> None:
    with pytest.raises(UsageError, match=r"uint8 \[3\], got uint8"):
        unpack(torch.zeros(length, dtype=torch.uint8), 4, [5])
