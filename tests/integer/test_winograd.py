"""3x3 convolutions in Winograd's form: sums against float64, at the edges of shapes and of what fits, on each processor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer.backend import Geometry, Span, Weights
from tcaq.integer.native import avx2, vnni
from tcaq.integer.native.avx2 import NARROW, native_products
from tcaq.integer.native.compiler import CompilerError
from tcaq.integer.native.vnni import native_vnni
from tcaq.integer.native.winograd import (
    FEWEST,
    HIGHEST,
    LARGEST,
    SAME,
    WinogradWeights,
    pairs,
    transformed,
    unsuited,
)  # fmt: skip

from .places import EACH, THREADS, numbers

MAKERS = {"AVX2": (native_products, avx2.BLOCK, NARROW), "VNNI": (native_vnni, vnni.BLOCK, HIGHEST)}
"""What makes them, output channels at once, and the largest code."""


def expected(codes: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    return conv2d(codes.double() - zero_point, weight.double(), padding=1)


def convolved(maker: str, codes: Tensor, weights: Weights, scale: float, zero_point: int, top: int) -> Tensor:
    make, block, _ = MAKERS[maker]
    return make().winograd.convolve(codes, WinogradWeights(weights, block), scale, zero_point, top)


def summed(maker: str, codes: Tensor, weight: Tensor, zero_point: int, top: int) -> Tensor:
    return convolved(maker, codes, Weights(weight, torch.ones(len(weight))), 1.0, zero_point, top).double()


SHAPES = {
    "whole tiles, whole blocks": ((2, 64, 8, 8), 64),
    "odd sides, channels that fill no four": ((3, 13, 9, 7), 33),
    "one pixel": ((2, 5, 1, 1), 3),
    "a row": ((1, 4, 1, 23), 16),
    "a column": ((1, 4, 23, 1), 17),
    "more channels than a vector, than a part": ((1, 1027, 5, 6), 40),
    "more tiles than a part": ((2, 260, 34, 30), 31),
}


@EACH
@THREADS
@pytest.mark.parametrize("largest", [7, LARGEST])
@pytest.mark.parametrize(("image", "out"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(image, out: int, largest: int, threads: int, maker: str, threads_after) -> None:
    torch.set_num_threads(threads)
    weight = numbers((out, image[1], 3, 3), -largest, largest, torch.int8)
    for top in {3, 15, MAKERS[maker][2]}:
        codes = numbers(image, 0, top, torch.uint8)
        for zero_point in (0, top // 3, top):
            found = summed(maker, codes, weight, zero_point, top)
            assert found.is_contiguous(memory_format=torch.channels_last)
            # float32 holds each sum, and rounds it once
            assert torch.equal(found, expected(codes, weight, zero_point).float().double())


@EACH
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("low", [True, False])
def test_the_largest_sums_are_exact(low: bool, sign: int, maker: str) -> None:
    top = MAKERS[maker][2]
    zero_point = 0 if low else top
    weight = torch.full((32, 1000, 3, 3), sign * LARGEST, dtype=torch.int8)
    codes = torch.full((1, 1000, 6, 6), top - zero_point, dtype=torch.uint8)
    assert torch.equal(
        summed(maker, codes, weight, zero_point, top), expected(codes, weight, zero_point).float().double()
    )


@EACH
@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("corner", [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)])
def test_each_weight_meets_its_own_pixel(place: int, corner: tuple[int, int], maker: str) -> None:
    weight, codes = torch.zeros(1, 1, 9, dtype=torch.int8), torch.zeros(1, 1, 5, 7, dtype=torch.uint8)
    weight[..., place], codes[..., corner[0], corner[1]] = LARGEST, NARROW
    weight = weight.unflatten(-1, (3, 3))
    assert torch.equal(summed(maker, codes, weight, 0, NARROW), expected(codes, weight, 0))


@EACH
def test_scales_and_biases_are_each_channels_own(maker: str) -> None:
    torch.manual_seed(0)
    codes, weight = numbers((2, 9, 7, 6), 0, 15, torch.uint8), numbers((41, 9, 3, 3), -8, 7, torch.int8)
    scale, bias = torch.rand(41) + 0.5, torch.randn(41)
    found = convolved(maker, codes, Weights(weight, scale, bias), 0.25, 5, 15)
    exact = expected(codes, weight, 5) * 0.25 * scale.double().reshape(1, -1, 1, 1) + bias.double().reshape(1, -1, 1, 1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@EACH
def test_codes_in_any_order_are_read_as_they_are_meant(maker: str) -> None:
    codes, weight = numbers((2, 8, 6, 5), 0, 15, torch.uint8), numbers((4, 8, 3, 3), -8, 7, torch.int8)
    assert codes.is_contiguous()
    beside = codes.contiguous(memory_format=torch.channels_last)
    assert torch.equal(summed(maker, codes, weight, 3, 15), summed(maker, beside, weight, 3, 15))


@EACH
def test_images_do_not_meet(maker: str) -> None:
    codes, weight = numbers((3, 16, 5, 5), 0, 15, torch.uint8), numbers((16, 16, 3, 3), -8, 7, torch.int8)
    alone = torch.cat([summed(maker, image[None], weight, 4, 15) for image in codes])
    assert torch.equal(summed(maker, codes, weight, 4, 15), alone)


def test_transformed_weights_are_four_times_those_of_floats() -> None:
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    kernels = numbers((5, 6, 3, 3), -LARGEST, LARGEST, torch.int8)
    assert torch.equal(transformed(kernels).double(), 4 * (g @ kernels.double() @ g.T).flatten(-2))


@pytest.mark.parametrize(("largest", "top", "fitting"), [(72, 15, 3), (126, 15, 2), (126, 63, 0), (30, 15, 9)])
def test_as_many_pairs_as_fit_are_added_in_16_bits(largest: int, top: int, fitting: int) -> None:
    assert pairs(largest, top) == fitting
    assert fitting * 2 * 4 * top * largest < 2**15 <= (fitting + 1) * 2 * 4 * top * largest


def test_what_it_is_not_for_has_a_reason() -> None:
    narrow, shape = Span(-8, 8, 15), (32, 32, 3, 3)
    assert unsuited(shape, SAME, narrow) is None
    assert unsuited(shape, SAME, Span(-LARGEST, LARGEST, HIGHEST)) is None
    for span in (Span(-LARGEST - 1, 0, 15), Span(0, LARGEST + 1, 15), Span(-8, 8, HIGHEST + 1)):
        assert "do not fit bytes" in unsuited(shape, SAME, span)
    for other in (Geometry(), Geometry((2, 2), (1, 1)), Geometry(padding=(1, 1), groups=2)):
        assert "keep the size" in unsuited(shape, other, narrow)
    assert "keep the size" in unsuited((32, 32, 1, 1), SAME, narrow)
    for few in ((FEWEST - 1, 32, 3, 3), (32, FEWEST - 1, 3, 3)):
        assert "pays from" in unsuited(few, SAME, narrow)


CHANGES = {
    "no zero point": ("4 * zero_point : 2 * top", "0 : 2 * top"),
    "a pixel too many": ("x >= 0 && ", ""),
    "sums too large": ("(Signed)done[2 * i + j] >> 2", "(Signed)done[2 * i + j] >> 1"),
}


@EACH
@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES)
def test_a_library_that_adds_otherwise_is_refused(old: str, new: str, maker: str, changed) -> None:
    changed({"AVX2": avx2, "VNNI": vnni}[maker], old, new, "winograd.h")
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        MAKERS[maker][0].__wrapped__()
