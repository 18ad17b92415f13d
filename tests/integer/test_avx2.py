"""Convolutions of ours for AVX2: sums against float64, at the edges of what fits, of shapes, and of threads; and who takes them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.functional import conv2d

import tcaq
from tcaq.integer.backend import Backend, Geometry, InputGrid, Span, Weights
from tcaq.integer.cpu import CPU
from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.lower import BACKENDS
from tcaq.integer.native import avx2, avx2_kernels
from tcaq.integer.native.avx2 import PackedWeights, native_products
from tcaq.integer.native.avx2_kernels import AVX2, AVX2_NARROW, AVX2_WIDE, Avx2Conv, Avx2Linear
from tcaq.integer.native.compiler import CompilerError, compiled
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.vnni_kernels import VNNI, VNNI_WIDE
from tcaq.integer.native.winograd import FEWEST, LARGEST, SAME
from tcaq.integer.native.winograd_kernels import WideWinogradConv, WinogradConv
from tcaq.integer.trial import LONGEST

from .places import THREADS, WITH_AVX2, numbers

pytestmark = WITH_AVX2


def expected(codes: Tensor, weight: Tensor, zero_point: int, geometry: Geometry, rest: Tensor | None = None) -> Tensor:
    whole = weight.double() if rest is None else weight.double() + rest.reshape(-1, 1, 1, 1)
    return conv2d(codes.double() - zero_point, whole, None, *geometry.arguments)


def summed(codes: Tensor, weights: Weights, zero_point: int, geometry: Geometry, top: int) -> Tensor:
    return native_products().convolve(codes, PackedWeights(weights, geometry), 1.0, zero_point, top).double()


SPANS = {
    "sums of many pairs fit": (-8, 7, 15),
    "sums of four pairs fit": (-16, 15, 255),
    "two pairs of the largest fit, to the last bit": (-32, 31, 255),
    "one pair alone fits": (-64, 63, 255),
    "no pair fits": (-128, 127, 255),
}
SHAPES = [
    ((2, 24, 9, 7), (33, 24, 3, 3), Geometry(padding=(1, 1))),
    ((3, 3, 20, 16), (16, 3, 3, 3), Geometry(stride=(2, 2), padding=(0, 1))),
    ((2, 6, 12, 11), (5, 6, 3, 5), Geometry(stride=(1, 2), padding=(2, 1), dilation=(2, 3))),
    ((1, 5, 9, 9), (7, 5, 4, 1), Geometry(padding=(3, 2), dilation=(2, 2))),
    ((2, 64, 6, 5), (18, 64, 1, 1), Geometry()),
    ((1, 1, 1, 1), (1, 1, 1, 1), Geometry()),
    ((1, 2500, 3, 3), (17, 2500, 1, 1), Geometry()),
    ((1, 700, 4, 4), (2, 700, 3, 3), Geometry(padding=(1, 1))),
]


@THREADS
@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize(("image", "shape", "geometry"), SHAPES, ids=str)
def test_sums_are_exact(image, shape, geometry, span, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    low, high, top = span
    codes, weight = numbers(image, 0, top, torch.uint8), numbers(shape, low, high, torch.int8)
    found = summed(codes, Weights(weight, torch.ones(len(weight))), top // 3, geometry, top)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # float32 holds each sum, and rounds it once
    assert torch.equal(found, expected(codes, weight, top // 3, geometry).float().double())


@pytest.mark.parametrize("span", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("end", [0, 1])
def test_the_largest_sums_are_exact(span, end: int) -> None:
    weight = torch.full((16, 260, 1, 1), span[end], dtype=torch.int8)
    codes = torch.full((1, 260, 3, 5), span[2], dtype=torch.uint8)
    found = summed(codes, Weights(weight, torch.ones(16)), 0, Geometry(), span[2])
    assert (found == 260 * span[end] * span[2]).all()


@pytest.mark.parametrize(("image", "shape", "geometry"), SHAPES, ids=str)
def test_what_bytes_lack_is_added_to_weights_alone(image, shape, geometry) -> None:
    codes, weight = numbers(image, 0, 255, torch.uint8), numbers(shape, -128, 127, torch.int8)
    rest = torch.arange(len(weight), dtype=torch.int32) * 7 - 100
    found = summed(codes, Weights(weight, torch.ones(len(weight)), rest=rest), 77, geometry, 255)
    assert torch.equal(found, expected(codes, weight, 77, geometry, rest).float().double())


def test_scales_and_biases_are_each_channels_own() -> None:
    torch.manual_seed(0)
    codes, weight = numbers((2, 9, 7, 6), 0, 15, torch.uint8), numbers((21, 9, 3, 3), -8, 7, torch.int8)
    scale, bias = torch.rand(21) + 0.5, torch.randn(21)
    packed = PackedWeights(Weights(weight, scale, bias), Geometry())
    sums = expected(codes, weight, 5, Geometry()) * 0.25 * scale.double().reshape(1, -1, 1, 1)
    without = native_products().convolve(codes, packed, 0.25, 5, 15, biased=False)
    torch.testing.assert_close(without.double(), sums, rtol=1e-6, atol=1e-5)
    biased = native_products().convolve(codes, packed, 0.25, 5, 15)
    torch.testing.assert_close(biased.double(), sums + bias.double().reshape(1, -1, 1, 1), rtol=1e-6, atol=1e-5)


def test_codes_in_any_order_are_read_as_they_are_meant() -> None:
    codes, weight = numbers((2, 8, 6, 5), 0, 15, torch.uint8), numbers((4, 8, 3, 3), -8, 7, torch.int8)
    weights, geometry = Weights(weight, torch.ones(4)), Geometry(padding=(1, 1))
    assert codes.is_contiguous()
    beside = codes.contiguous(memory_format=torch.channels_last)
    assert torch.equal(summed(codes, weights, 3, geometry, 15), summed(beside, weights, 3, geometry, 15))


@pytest.mark.parametrize(
    ("low", "high", "top", "pairs"),
    [(-8, 7, 15, 136), (-8, 7, 255, 8), (-32, 31, 255, 2), (-64, 63, 255, 0), (0, 0, 0, 2**14 - 1)],
)
def test_as_many_pairs_are_added_in_16_bits_as_fit(low: int, high: int, top: int, pairs: int) -> None:
    weight = torch.tensor([low, high], dtype=torch.int8).reshape(1, 2, 1, 1)
    packed = PackedWeights(Weights(weight, torch.ones(1)), Geometry())
    assert packed.pairs(top) == pairs
    assert pairs * 2 * max(-low, high) * top < 2**15


def test_tokens_have_grids_of_their_own_beside_what_bytes_lack() -> None:
    torch.manual_seed(0)
    weight, rest = numbers((20, 13), -128, 127, torch.int8), torch.arange(20, dtype=torch.int32) - 9
    scale, bias = torch.rand(20) / 100, torch.randn(20)
    codes, zero = torch.randint(0, 256, (4, 6, 13)), torch.randint(0, 256, (4, 6, 1)).float()
    steps = torch.rand(4, 6, 1) + 0.5
    grid = InputGrid(steps, zero, torch.ones(13), 255)
    found = Avx2Linear(Weights(weight, scale, bias, rest))((codes - zero) * steps, grid, torch.float32)
    whole = (weight.double() + rest.double().reshape(-1, 1)) * scale.double().reshape(-1, 1)
    exact = ((codes.double() - zero.double()) @ whole.T) * steps.double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


MATRICES = [(3, 7, 16, 33), (1, 1, 1, 1), (2, 13, 50, 16), (2, 256, 48, 256), (1, 5, 4096, 3), (1, 5, 4099, 3)]


@THREADS
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices_of_activations_are_multiplied_exactly(shape, turned: bool, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    count, rows, inner, columns = shape
    left = numbers((count, rows, inner), -128, 127, torch.int8)
    right = numbers((count, columns, inner) if turned else (count, inner, columns), -128, 127, torch.int8)
    left[:, 0], right[0, 0] = -128, -128
    right = right.mT if turned else right
    row, column = torch.arange(count * rows, dtype=torch.int32), torch.arange(count * columns, dtype=torch.int32)
    row, column = 1000 * row.reshape(count, rows, 1), -1000 * column.reshape(count, 1, columns)
    sums = left.double() @ right.double()
    assert torch.equal(AVX2.product(left, right, None, None, 1.0).double(), sums.float().double())
    found = AVX2.product(left, right, row, column, 0.5).double()
    assert torch.equal(found, 0.5 * (sums + row + column).float().double())


def test_what_it_cannot_do_has_a_reason() -> None:
    span = Span(-8, 7, 15)
    assert "2 groups has no kernel" in AVX2.conv_problem((8, 4, 3, 3), Geometry(groups=2), span)
    assert "may not fit 32 bits" in AVX2.conv_problem((8, LONGEST // 9 + 1, 3, 3), Geometry(), span)
    assert "may not fit 32 bits" in AVX2.linear_problem((8, LONGEST + 1), span)
    assert AVX2.conv_problem((8, 4, 3, 3), Geometry(), Span(-128, 127, 255)) is None


def test_it_is_taken_where_there_is_no_vnni(tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    def kernels(vnni: bool | None, helps: bool) -> set[type]:
        monkeypatch.setattr(avx2_kernels, "has_vnni", lambda: vnni)
        monkeypatch.setattr(native_products(), "helps", helps)
        pipe = quantized_tiny(tiny_pipeline())
        assert tcaq.lower(pipe).missing == ()
        return {type(layer._kernel) for layer in pipe.unet.modules() if isinstance(layer, IntegerConv2d)}

    assert BACKENDS["cpu"] == (AVX2_NARROW, AVX2_WIDE, AVX2, VNNI, VNNI_WIDE, COMPILED, CPU)
    monkeypatch.setitem(BACKENDS, "cpu", (AVX2, COMPILED))
    assert kernels(vnni=False, helps=True) == {Avx2Conv}
    assert kernels(vnni=None, helps=True) == {Avx2Conv}  # where the system does not say, the compiler does
    assert kernels(vnni=None, helps=False) == {COMPILED.conv}
    assert kernels(vnni=True, helps=True) == {COMPILED.conv}


@pytest.mark.parametrize(
    ("bits", "backend", "kernel"), [(4, AVX2_NARROW, WinogradConv), (8, AVX2_WIDE, WideWinogradConv)]
)
@torch.no_grad()
def test_convolutions_have_winograds_form_there_and_predict_the_same(
    bits: int, backend: Backend, kernel: type, tiny_pipeline, quantized_tiny, monkeypatch
) -> None:
    def lowered(*backends: Backend) -> UNet2DModel:
        monkeypatch.setitem(BACKENDS, "cpu", backends)
        pipe = quantized_tiny(tiny_pipeline((8, FEWEST, FEWEST)), weights=bits, activations=bits)
        tcaq.lower(pipe)
        return pipe.unet

    def kernels(unet: UNet2DModel) -> set[type]:
        return {type(layer._kernel) for layer in unet.modules() if isinstance(layer, IntegerConv2d)}

    monkeypatch.setattr(avx2_kernels, "has_vnni", lambda: False)
    monkeypatch.setattr(native_products(), "helps", True)
    own, others = lowered(backend, AVX2, COMPILED), lowered(COMPILED)
    assert kernels(own) == {kernel, Avx2Conv}
    assert kernels(others) == {COMPILED.conv}
    x, when = torch.randn(2, 1, 16, 16), torch.tensor(500)
    torch.testing.assert_close(own(x, when).sample, others(x, when).sample, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_16_bits_twice_is_convolved_as_it_is() -> None:
    shape = (32, 32, 3, 3)
    assert AVX2_NARROW.conv_problem(shape, SAME, Span(-8, 8, 15)) is None
    assert AVX2_NARROW.conv_problem(shape, SAME, Span(-LARGEST, LARGEST, 15)) is None
    assert "do not fit 16 bits twice" in AVX2_NARROW.conv_problem(shape, SAME, Span(-8, 8, 63))
    assert "keep the size" in AVX2_NARROW.conv_problem((32, 32, 1, 1), SAME, Span(-8, 8, 15))


def test_what_is_compiled_goes_where_the_model_goes() -> None:
    products = native_products()
    assert copy.deepcopy(products) is products
    assert pickle.loads(pickle.dumps(products)) is products


@pytest.mark.parametrize(
    ("old", "new"),
    [("part.fours - at < left", "1"), ("_mm256_add_epi16(even, more)", "even"), ("zero_point * own[c]", "0")],
)
def test_a_library_that_adds_otherwise_is_refused(old: str, new: str, changed) -> None:
    changed(avx2, old, new)
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        native_products.__wrapped__()


def test_a_processor_without_avx2_has_none_of_it(changed) -> None:
    changed(avx2, "#if defined(__AVX2__)", "#if 0")
    with pytest.raises(CompilerError, match="has no AVX2"):
        native_products.__wrapped__()


def test_half_a_library_is_refused(changed) -> None:
    changed(avx2, "#define SHARED 96", "#define SHARED 48")  # so that it was not loaded before
    compiled(avx2.SOURCE).write_bytes(b"half a library")
    with pytest.raises(CompilerError, match="cannot be loaded"):
        native_products.__wrapped__()
