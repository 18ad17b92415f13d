"""Products of ours for AVX-512 VNNI: sums against float64, at the edges of shapes and of what fits; and who has them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import UNet2DModel
from torch.nn.functional import conv2d

import tcaq
from tcaq.integer.backend import Geometry, InputGrid, Span, Weights
from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.lower import BACKENDS
from tcaq.integer.native import vnni
from tcaq.integer.native.compiler import CompilerError
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.vnni import PackedWeights, native_vnni
from tcaq.integer.native.vnni_kernels import VNNI, PixelConv, VnniLinear
from tcaq.integer.native.winograd import FEWEST, SAME
from tcaq.integer.native.winograd_kernels import WinogradConv
from tcaq.integer.trial import LONGEST

from .places import THREADS, WITH_AVX512_VNNI, numbers

pytestmark = WITH_AVX512_VNNI


MATRICES = [
    (1, 1, 1),
    (8, 13, 33),
    (12, 64, 32),
    (13, 67, 5),
    (96, 128, 64),
    (97, 130, 70),
    (500, 1027, 31),
    (2048, 256, 256),
]


@THREADS
@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_sums_of_matrices_are_exact(shape, lacking: bool, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    count, channels, out = shape
    codes, weight = numbers((count, channels), 0, 255, torch.uint8), numbers((out, channels), -128, 127, torch.int8)
    codes[-1], weight[-1] = 255, -128
    rest = 7 * torch.arange(out, dtype=torch.int32) - 100 if lacking else None
    whole = weight.double() + (0 if rest is None else rest.double()[:, None])
    packed, sums = PackedWeights(Weights(weight, torch.ones(out), rest=rest)), codes.sum(1, dtype=torch.int32)
    for zero_point in (0, 100, 255):
        found = native_vnni().multiply(codes, sums if lacking else None, packed, 1.0, zero_point)
        assert torch.equal(found.double(), ((codes.double() - zero_point) @ whole.T).float().double())


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("tokens", [2, 9])
def test_tokens_have_grids_of_their_own(tokens: int, lacking: bool) -> None:
    torch.manual_seed(0)
    weight, scale, bias = numbers((20, 13), -128, 127, torch.int8), torch.rand(20) / 100, torch.randn(20)
    rest = torch.arange(20, dtype=torch.int32) - 9 if lacking else None
    codes, zero = torch.randint(0, 256, (4, tokens, 13)), torch.randint(0, 256, (4, tokens, 1)).float()
    steps = torch.rand(4, tokens, 1) + 0.5
    grid = InputGrid(steps, zero, torch.ones(13), 255)
    found = VnniLinear(Weights(weight, scale, bias, rest))((codes - zero) * steps, grid, torch.float32)
    whole = (weight.double() + (0 if rest is None else rest.double()[:, None])) * scale.double()[:, None]
    exact = ((codes.double() - zero.double()) @ whole.T) * steps.double() + bias.double()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_single_pixels_is_a_matrix_product(layout: torch.memory_format, lacking: bool) -> None:
    torch.manual_seed(0)
    weight, scale, bias = numbers((21, 9, 1, 1), -128, 127, torch.int8), torch.rand(21) / 100, torch.randn(21)
    rest = torch.arange(21, dtype=torch.int32) - 9 if lacking else None
    codes, equalizer = numbers((2, 9, 7, 6), 0, 255, torch.uint8), torch.rand(9) + 0.5
    x = ((codes.float() - 90) * 0.25 * equalizer[:, None, None]).contiguous(memory_format=layout)
    found = PixelConv(Weights(weight, scale, bias, rest))(x, InputGrid(0.25, 90, equalizer, 255), torch.float32)
    whole = (weight.double() + (0 if rest is None else rest.double()[:, None, None, None])) * scale.double()[
        :, None, None, None
    ]
    exact = conv2d((codes.double() - 90) * 0.25, whole, bias.double())
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_has_a_reason() -> None:
    wide = Span(-128, 127, 255)
    assert "do not fit bytes" in VNNI.conv_problem((32, 32, 3, 3), SAME, wide)
    assert "keep the size" in VNNI.conv_problem((32, 32, 1, 1), SAME, wide)
    assert VNNI.conv_problem((3, 5, 1, 1), Geometry(), wide) is None
    for problem in (
        VNNI.conv_problem((8, LONGEST + 1, 1, 1), Geometry(), wide),
        VNNI.linear_problem((8, LONGEST + 1), wide),
    ):
        assert "may not fit 32 bits" in problem


@torch.no_grad()
def test_layers_of_four_bits_have_it_and_predict_the_same(tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    def lowered(helps: bool) -> UNet2DModel:
        monkeypatch.setattr(native_vnni(), "helps", helps)
        pipe = quantized_tiny(tiny_pipeline((8, FEWEST, FEWEST)), activations=4)
        assert tcaq.lower(pipe).missing == ()
        return pipe.unet

    def kernels(unet: UNet2DModel) -> dict[type, set[tuple[int, int]]]:
        found: dict[type, set[tuple[int, int]]] = {}
        for layer in unet.modules():
            if isinstance(layer, IntegerConv2d):
                found.setdefault(type(layer._kernel), set()).add((layer.in_channels, layer.out_channels))
        return found

    assert BACKENDS["cpu"].index(VNNI) < BACKENDS["cpu"].index(COMPILED)
    own, others = lowered(helps=True), lowered(helps=False)
    assert set(kernels(own)) == {WinogradConv, PixelConv, COMPILED.conv}
    assert all(min(pair) >= FEWEST for pair in kernels(own)[WinogradConv])
    assert set(kernels(others)) == {COMPILED.conv}
    x, when = torch.randn(2, 1, 16, 16), torch.tensor(500)
    torch.testing.assert_close(own(x, when).sample, others(x, when).sample, rtol=1e-5, atol=1e-5)


def test_what_is_compiled_goes_where_the_model_goes() -> None:
    kernel = native_vnni()
    assert copy.deepcopy(kernel) is kernel
    assert pickle.loads(pickle.dumps(kernel)) is kernel


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_mm512_set1_epi32(sum))", "_mm512_set1_epi32(0))"),
        ("-zero_point * weights.sums", "0 * weights.sums"),
        ("least(row, count - TILES)", "0"),
    ],
)
def test_a_library_that_adds_otherwise_is_refused(old: str, new: str, changed) -> None:
    changed(vnni, old, new)
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        native_vnni.__wrapped__()


def test_a_processor_without_the_instructions_has_none_of_it(changed) -> None:
    changed(vnni, "#if defined(__AVX512VNNI__)", "#if 0 && defined(__AVX512VNNI__)")
    with pytest.raises(CompilerError, match="has no AVX-512 VNNI"):
        native_vnni.__wrapped__()
