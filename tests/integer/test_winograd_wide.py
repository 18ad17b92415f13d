"""3x3 convolutions in Winograd's form of 16 bits: sums against float64, at the edges of shapes and of what comes round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer.backend import Backend, Geometry, Span, Weights
from tcaq.integer.native import avx2, avx2_kernels, vnni, vnni_kernels
from tcaq.integer.native.avx2 import native_products
from tcaq.integer.native.avx2_kernels import AVX2_WIDE
from tcaq.integer.native.compiler import CompilerError
from tcaq.integer.native.vnni import native_vnni
from tcaq.integer.native.vnni_kernels import VNNI_WIDE
from tcaq.integer.native.winograd import FEWEST, FOUR, SAME
from tcaq.integer.native.winograd_wide import BELOW, WIDEST, WideWeights, chunks_of, deep_of

from .places import EACH, THREADS, WITH_AVX2, WITH_AVX512_VNNI, numbers

MAKERS = {"AVX2": (native_products, avx2.BLOCK, avx2), "VNNI": (native_vnni, vnni.BLOCK, vnni)}
"""What makes them, output channels at once, and the module that compiles it."""


def expected(codes: Tensor, weight: Tensor, zero_point: int, rest: Tensor | None = None) -> Tensor:
    whole = weight.double() + (0 if rest is None else rest.double().reshape(-1, 1, 1, 1))
    return conv2d(codes.double() - zero_point, whole, padding=1)


def convolved(maker: str, codes: Tensor, weights: Weights, scale: float, zero_point: int) -> Tensor:
    make, block, _ = MAKERS[maker]
    return make().wide.convolve(codes, WideWeights(weights, block), scale, zero_point)


def summed(maker: str, codes: Tensor, weight: Tensor, zero_point: int, rest: Tensor | None = None) -> Tensor:
    return convolved(maker, codes, Weights(weight, torch.ones(len(weight)), rest=rest), 1.0, zero_point).double()


SHAPES = {
    "whole tiles, whole blocks": ((2, 64, 8, 8), 64),
    "odd sides, channels that fill no four": ((3, 13, 9, 7), 33),
    "one pixel": ((2, 5, 1, 1), 3),
    "a row": ((1, 4, 1, 23), 16),
    "a column": ((1, 4, 23, 1), 17),
    "sides of five, six and seven": ((1, 8, 5, 6), 16),
    "more channels than a vector": ((1, 517, 7, 7), 40),
    "more tiles than a part": ((2, 260, 34, 30), 31),
}


@EACH
@THREADS
@pytest.mark.parametrize(("image", "out"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(image, out: int, threads: int, maker: str, threads_after) -> None:
    torch.set_num_threads(threads)
    for low, high, top in ((-8, 7, 255), (-32, 31, 63), (-128, 127, 255)):
        weight, codes = numbers((out, image[1], 3, 3), low, high, torch.int8), numbers(image, 0, top, torch.uint8)
        for zero_point in (0, top // 3, top):
            found = summed(maker, codes, weight, zero_point)
            assert found.is_contiguous(memory_format=torch.channels_last)
            # float32 holds each sum, and rounds it once
            assert torch.equal(found, expected(codes, weight, zero_point).float().double())


@EACH
@pytest.mark.parametrize("threads", [3, 5])
def test_blocks_are_shared_where_tiles_are_few(threads: int, maker: str, threads_after) -> None:
    torch.set_num_threads(threads)
    weight, codes = numbers((70, 12, 3, 3), -128, 127, torch.int8), numbers((1, 12, 4, 4), 0, 255, torch.uint8)
    assert torch.equal(summed(maker, codes, weight, 100), expected(codes, weight, 100))


@EACH
@pytest.mark.parametrize("zero_point", [0, WIDEST])
@pytest.mark.parametrize("weight", [-255, 255])
@pytest.mark.parametrize("channels", [56, 57, 300])
def test_the_largest_sums_are_exact(channels: int, weight: int, zero_point: int, maker: str) -> None:
    codes = torch.full((1, channels, 6, 6), WIDEST - zero_point, dtype=torch.uint8)
    low = torch.full((16, channels, 3, 3), weight // 2, dtype=torch.int8)
    rest = torch.full((16,), weight - weight // 2, dtype=torch.int32)
    assert torch.equal(
        summed(maker, codes, low, zero_point, rest), expected(codes, low, zero_point, rest).float().double()
    )


@EACH
@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("corner", [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3), (3, 4)])
def test_each_weight_meets_its_own_pixel(place: int, corner: tuple[int, int], maker: str) -> None:
    weight, codes = torch.zeros(1, 1, 9, dtype=torch.int8), torch.zeros(1, 1, 5, 7, dtype=torch.uint8)
    weight[..., place], codes[..., corner[0], corner[1]] = -127, 255
    weight = weight.unflatten(-1, (3, 3))
    assert torch.equal(summed(maker, codes, weight, 0), expected(codes, weight, 0))


@EACH
@pytest.mark.parametrize("channels", [16, 13])
def test_what_bytes_lack_is_added_to_weights_alone(channels: int, maker: str) -> None:
    codes, weight = (
        numbers((2, channels, 7, 6), 0, 255, torch.uint8),
        numbers((41, channels, 3, 3), -128, 127, torch.int8),
    )
    rest = torch.arange(41, dtype=torch.int32) * 6 - 120
    assert torch.equal(summed(maker, codes, weight, 77, rest), expected(codes, weight, 77, rest))


@EACH
def test_scales_and_biases_are_each_channels_own(maker: str) -> None:
    torch.manual_seed(0)
    codes, weight = numbers((2, 9, 7, 6), 0, 255, torch.uint8), numbers((41, 9, 3, 3), -128, 127, torch.int8)
    scale, bias = (torch.rand(41) + 0.5) / 1000, torch.randn(41)
    found = convolved(maker, codes, Weights(weight, scale, bias), 0.25, 50)
    exact = expected(codes, weight, 50) * 0.25 * scale.double().reshape(1, -1, 1, 1) + bias.double().reshape(
        1, -1, 1, 1
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


@EACH
def test_codes_in_any_order_are_read_as_they_are_meant(maker: str) -> None:
    codes, weight = numbers((2, 8, 6, 5), 0, 255, torch.uint8), numbers((4, 8, 3, 3), -128, 127, torch.int8)
    assert codes.is_contiguous()
    assert torch.equal(
        summed(maker, codes, weight, 3), summed(maker, codes.contiguous(memory_format=torch.channels_last), weight, 3)
    )


@EACH
def test_images_do_not_meet(maker: str) -> None:
    codes, weight = numbers((3, 16, 5, 5), 0, 255, torch.uint8), numbers((16, 16, 3, 3), -128, 127, torch.int8)
    alone = torch.cat([summed(maker, image[None], weight, 4) for image in codes])
    assert torch.equal(summed(maker, codes, weight, 4), alone)


@pytest.mark.parametrize("channels", [4, 56, 60, 116, 512])
@pytest.mark.parametrize("largest", [1, 40, 255])
def test_sums_of_no_chunk_leave_what_is_recovered(channels: int, largest: int) -> None:
    reach = torch.full((2, 3, channels), 9 * largest)
    reach[1] = 0
    count = chunks_of(reach)
    deep = deep_of(channels, count)
    assert deep % FOUR == 0
    assert (count - 1) * deep < channels <= count * deep
    assert min(deep, channels) * 9 * largest * WIDEST < BELOW
    if count > 1:
        assert deep_of(channels, count - 1) * 9 * largest * WIDEST >= BELOW


def test_weights_of_both_signs_reach_less_far() -> None:
    """Half of 128 channels' weights pull up and half down: in one chunk, where those of one sign need two."""
    weight = torch.full((16, 128, 3, 3), 127, dtype=torch.int8)
    assert WideWeights(Weights(weight, torch.ones(16)), 16).chunks == 2
    weight[:, ::2] = -127
    assert WideWeights(Weights(weight, torch.ones(16)), 16).chunks == 1


@pytest.mark.parametrize(
    ("backend", "span", "fewest"),
    [
        pytest.param(AVX2_WIDE, Span(-128, 127, 255), FEWEST, marks=WITH_AVX2),
        pytest.param(AVX2_WIDE, Span(-8, 8, 255), avx2_kernels.MANY, marks=WITH_AVX2),
        pytest.param(VNNI_WIDE, Span(-128, 127, 255), vnni_kernels.MANY, marks=WITH_AVX512_VNNI),
    ],
)
def test_what_it_is_not_for_has_a_reason(backend: Backend, span: Span, fewest: int) -> None:
    assert backend.conv_problem((fewest, fewest, 3, 3), SAME, span) is None
    for few in ((fewest - 1, fewest, 3, 3), (fewest, fewest - 1, 3, 3)):
        assert f"from {fewest} channels" in backend.conv_problem(few, SAME, span)
    for other in (Geometry(), Geometry((2, 2), (1, 1)), Geometry(padding=(1, 1), groups=2)):
        assert "keep the size" in backend.conv_problem((fewest, fewest, 3, 3), other, span)


CHANGES = {
    "zeros that are codes": ("(NarrowCodes){0} + (uint8_t)zero_point", "(NarrowCodes){0}"),
    "nines that stay": ("whole[i] * NINTH", "whole[i]"),
    "a chunk too many": ("chunk = 1; chunk < kernels->chunks", "chunk = 0; chunk < kernels->chunks"),
}


@EACH
@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES)
def test_a_library_that_adds_otherwise_is_refused(old: str, new: str, maker: str, changed) -> None:
    make, _, module = MAKERS[maker]
    changed(module, old, new, "winograd_wide.h")
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        make.__wrapped__()
