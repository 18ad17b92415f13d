"""3x3 convolutions in Winograd's form: sums against float64, at the edges of shapes and of what fits; and who has them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.functional import conv2d

import tcaq
from tcaq.integer.backend import Geometry, Span, Weights
from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.lower import BACKENDS
from tcaq.integer.native import winograd
from tcaq.integer.native.compiler import CompilerError
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.winograd import HIGHEST, LARGEST, WinogradWeights, native_winograd
from tcaq.integer.native.winograd_kernels import FEWEST, WINOGRAD, WinogradConv

from .places import THREADS, WITH_AVX512_VNNI

pytestmark = WITH_AVX512_VNNI
SAME = Geometry(padding=(1, 1))


def numbers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def expected(codes: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    return conv2d(codes.double() - zero_point, weight.double(), padding=1)


def summed(codes: Tensor, weight: Tensor, zero_point: int, top: int) -> Tensor:
    packed = WinogradWeights(Weights(weight, torch.ones(len(weight))))
    return native_winograd().convolve(codes, packed, 1.0, zero_point, top).double()


SHAPES = {
    "whole tiles, whole blocks": ((2, 64, 8, 8), 64),
    "odd sides, channels that fill no four": ((3, 13, 9, 7), 33),
    "one pixel": ((2, 5, 1, 1), 3),
    "a row": ((1, 4, 1, 23), 16),
    "a column": ((1, 4, 23, 1), 17),
    "more channels than a vector, than a part": ((1, 1027, 5, 6), 40),
    "more tiles than a part": ((2, 260, 34, 30), 31),
}


@THREADS
@pytest.mark.parametrize("top", [3, 15, HIGHEST])
@pytest.mark.parametrize(("image", "out"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(image, out: int, top: int, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    codes = numbers(image, 0, top, torch.uint8)
    weight = numbers((out, image[1], 3, 3), -LARGEST, LARGEST, torch.int8)
    for zero_point in (0, top // 3, top):
        found = summed(codes, weight, zero_point, top)
        assert found.is_contiguous(memory_format=torch.channels_last)
        # float32 holds each sum, and rounds it once
        assert torch.equal(found, expected(codes, weight, zero_point).float().double())


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("zero_point", [0, HIGHEST])
def test_the_largest_sums_are_exact(zero_point: int, sign: int) -> None:
    weight = torch.full((32, 1000, 3, 3), sign * LARGEST, dtype=torch.int8)
    codes = torch.full((1, 1000, 6, 6), HIGHEST - zero_point, dtype=torch.uint8)
    assert torch.equal(summed(codes, weight, zero_point, HIGHEST), expected(codes, weight, zero_point).float().double())


@pytest.mark.parametrize("place", range(9))
@pytest.mark.parametrize("corner", [(0, 0), (0, 6), (4, 0), (4, 6), (2, 3)])
def test_each_weight_meets_its_own_pixel(place: int, corner: tuple[int, int]) -> None:
    weight, codes = torch.zeros(1, 1, 9, dtype=torch.int8), torch.zeros(1, 1, 5, 7, dtype=torch.uint8)
    weight[..., place], codes[..., corner[0], corner[1]] = LARGEST, HIGHEST
    weight = weight.unflatten(-1, (3, 3))
    assert torch.equal(summed(codes, weight, 0, HIGHEST), expected(codes, weight, 0))


def test_scales_and_biases_are_each_channels_own() -> None:
    torch.manual_seed(0)
    codes, weight = numbers((2, 9, 7, 6), 0, 15, torch.uint8), numbers((41, 9, 3, 3), -8, 7, torch.int8)
    scale, bias = torch.rand(41) + 0.5, torch.randn(41)
    found = native_winograd().convolve(codes, WinogradWeights(Weights(weight, scale, bias)), 0.25, 5, 15)
    exact = expected(codes, weight, 5) * 0.25 * scale.double().reshape(1, -1, 1, 1) + bias.double().reshape(1, -1, 1, 1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)


def test_codes_in_any_order_are_read_as_they_are_meant() -> None:
    codes, weight = numbers((2, 8, 6, 5), 0, 15, torch.uint8), numbers((4, 8, 3, 3), -8, 7, torch.int8)
    assert codes.is_contiguous()
    beside = codes.contiguous(memory_format=torch.channels_last)
    assert torch.equal(summed(codes, weight, 3, 15), summed(beside, weight, 3, 15))


def test_images_do_not_meet() -> None:
    codes, weight = numbers((3, 16, 5, 5), 0, 15, torch.uint8), numbers((16, 16, 3, 3), -8, 7, torch.int8)
    alone = torch.cat([summed(image[None], weight, 4, 15) for image in codes])
    assert torch.equal(summed(codes, weight, 4, 15), alone)


def test_what_it_cannot_do_has_a_reason() -> None:
    narrow, shape = Span(-8, 8, 15), (32, 32, 3, 3)
    assert WINOGRAD.conv_problem(shape, SAME, narrow) is None
    assert WINOGRAD.conv_problem(shape, SAME, Span(-LARGEST, LARGEST, HIGHEST)) is None
    for span in (Span(-LARGEST - 1, 0, 15), Span(0, LARGEST + 1, 15), Span(-8, 8, HIGHEST + 1)):
        assert "do not fit bytes" in WINOGRAD.conv_problem(shape, SAME, span)
    for other in (Geometry(), Geometry((2, 2), (1, 1)), Geometry(padding=(1, 1), groups=2)):
        assert "keep the size" in WINOGRAD.conv_problem(shape, other, narrow)
    assert "keep the size" in WINOGRAD.conv_problem((32, 32, 1, 1), SAME, narrow)
    for few in ((FEWEST - 1, 32, 3, 3), (32, FEWEST - 1, 3, 3)):
        assert "it pays from" in WINOGRAD.conv_problem(few, SAME, narrow)


@torch.no_grad()
def test_layers_of_four_bits_have_it_and_predict_the_same(tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    def lowered(helps: bool) -> UNet2DModel:
        monkeypatch.setattr(native_winograd(), "helps", helps)
        pipe = quantized_tiny(tiny_pipeline((8, FEWEST, FEWEST)), activations=4)
        assert tcaq.lower(pipe).missing == ()
        return pipe.unet

    def kernels(unet: UNet2DModel) -> dict[type, set[tuple[int, int]]]:
        found: dict[type, set[tuple[int, int]]] = {}
        for layer in unet.modules():
            if isinstance(layer, IntegerConv2d):
                found.setdefault(type(layer._kernel), set()).add((layer.in_channels, layer.out_channels))
        return found

    assert BACKENDS["cpu"].index(WINOGRAD) < BACKENDS["cpu"].index(COMPILED)
    own, others = lowered(helps=True), lowered(helps=False)
    assert set(kernels(own)) == {WinogradConv, COMPILED.conv}
    assert all(min(pair) >= FEWEST for pair in kernels(own)[WinogradConv])
    assert set(kernels(others)) == {COMPILED.conv}
    x, when = torch.randn(2, 1, 16, 16), torch.tensor(500)
    torch.testing.assert_close(own(x, when).sample, others(x, when).sample, rtol=1e-5, atol=1e-5)


def test_what_is_compiled_goes_where_the_model_goes() -> None:
    kernel = native_winograd()
    assert copy.deepcopy(kernel) is kernel
    assert pickle.loads(pickle.dumps(kernel)) is kernel


def changed(tmp_path: Path, monkeypatch, old: str, new: str) -> None:
    source = tmp_path / "winograd.c"
    text = winograd.SOURCE.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(winograd, "SOURCE", source)


@pytest.mark.parametrize(
    ("old", "new"),
    [("4 * zero_point : 2 * top", "0 : 2 * top"), ("x >= 0 && ", ""), ("done[2 * i + j], 2)", "done[2 * i + j], 1)")],
)
def test_a_library_that_adds_otherwise_is_refused(old: str, new: str, tmp_path: Path, monkeypatch) -> None:
    changed(tmp_path, monkeypatch, old, new)
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        native_winograd.__wrapped__()


def test_a_processor_without_the_instructions_has_none_of_it(tmp_path: Path, monkeypatch) -> None:
    changed(tmp_path, monkeypatch, "#if defined(__AVX512VNNI__)", "#if 0 && defined(__AVX512VNNI__)")
    with pytest.raises(CompilerError, match="has no AVX-512 VNNI"):
        native_winograd.__wrapped__()
