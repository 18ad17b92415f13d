"""Whole models and layers of real size on a GPU; the models also in Triton's interpreter where there is none.

Fake layers compute in float32 without TF32, whose 10 bits would hide what is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, unfold

import tcaq
from tcaq.evaluate.metrics import psnr
from tcaq.integer.backend import Geometry, InputGrid, Weights
from tcaq.integer.cuda import CUDA
from tcaq.integer.cuda_triton import TRITON
from tcaq.integer.layer import IntegerLayer
from tcaq.integer.lower import BACKENDS
from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import sample

from .places import GPU, HERE, ON_GPU, WITH_TRITON

KERNELS = pytest.mark.parametrize(
    "backend",
    [pytest.param(TRITON, id="triton", marks=WITH_TRITON), pytest.param(CUDA, id="int_mm", marks=ON_GPU)],
)


@pytest.fixture(autouse=True)
def whole_floats() -> Iterator[None]:
    """No TF32."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def whole_convolution(codes: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Sums of whole numbers, in float64 by matrix products, which hold them exactly: int64 has none on a GPU."""
    top, side = geometry.padding
    windows = unfold(
        pad(codes.double(), (side, side, top, top)), weight.shape[2:], geometry.dilation, stride=geometry.stride
    )
    return weight.double().flatten(1) @ windows


REAL = [
    pytest.param(8, (256, 256, 3, 3), 32, Geometry(padding=(1, 1)), id="a block of DDPM CIFAR-10"),
    pytest.param(64, (128, 384, 3, 3), 32, Geometry(padding=(1, 1)), id="its widest, a batch of 64"),
    pytest.param(4, (640, 320, 3, 3), 64, Geometry((2, 2), (1, 1)), id="downsampling in Stable Diffusion"),
    pytest.param(2, (1280, 2560, 3, 3), 8, Geometry(padding=(1, 1)), id="its longest sums"),
    pytest.param(8, (3, 128, 3, 3), 32, Geometry(padding=(1, 1)), id="the last layer"),
    pytest.param(8, (128, 3, 3, 3), 33, Geometry(padding=(1, 1)), id="the first layer, an odd size"),
    pytest.param(16, (256, 512, 1, 1), 16, Geometry(), id="a shortcut"),
]


@ON_GPU
@KERNELS
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(("images", "shape", "size", "geometry"), REAL)
def test_real_layers_sum_exactly(
    images: int, shape: tuple[int, ...], size: int, geometry: Geometry, last: bool, backend
) -> None:
    generator, zero = torch.Generator("cuda").manual_seed(0), 93
    weight = torch.randint(-128, 128, shape, generator=generator, device="cuda", dtype=torch.int8)
    codes = torch.randint(0, 256, (images, shape[1], size, size), generator=generator, device="cuda")
    x = (codes - zero).float().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    grid, ones = InputGrid(1.0, zero, torch.ones(shape[1], device="cuda"), 255), torch.ones(shape[0], device="cuda")
    exact = whole_convolution(codes - zero, weight, geometry).float()
    for kernel in (backend.conv(Weights(weight, ones), geometry),) * 2:  # the first call chooses blocks
        assert torch.equal(kernel(x, grid, torch.float32).flatten(2), exact)


@ON_GPU
@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "inner", "out"), [(8, 128, 512), (4096, 1152, 3456), (4097, 4608, 1152)])
def test_scales_biases_and_the_rest_are_part_of_the_product(
    rows: int, inner: int, out: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, rest = torch.randint(-128, 128, (out, inner)), torch.randint(-127, 128, (out,))
    codes, scale, bias = torch.randint(0, 256, (rows, inner)), torch.rand(out) / inner, torch.randn(out)
    given = Weights(weight.to("cuda", torch.int8), scale.cuda(), bias.cuda(), rest.cuda().int())
    grid = InputGrid(1.0, 93, torch.ones(inner, device="cuda"), 255)
    found = TRITON.linear(given)((codes - 93).to("cuda", dtype), grid, dtype)
    exact = (codes.cuda() - 93).double() @ (weight + rest.unsqueeze(1)).cuda().double().T
    exact = exact * scale.cuda().double() + bias.cuda().double()
    roundings = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= roundings * (exact.abs() + bias.cuda().abs())).all()


def lowered_here(pipe, backend, monkeypatch: pytest.MonkeyPatch):
    """Lower by one backend alone, whether it finds a GPU or not."""
    monkeypatch.setitem(BACKENDS, HERE, (replace(backend, missing=lambda: None),))
    lowering = tcaq.lower(pipe)
    assert {row.reason for row in lowering.kept} <= {"products of two activations have no integer kernel"}
    return pipe


def met(denoiser: nn.Module, ask) -> dict[str, tuple[QuantizedWeight, Tensor]]:
    """Each layer, and what it was given."""
    found = {}

    def remember(name):
        return lambda layer, args, _: found.update({name: (layer, args[0])})

    layers = [(n, layer) for n, layer in quantized_layers(denoiser) if isinstance(layer, QuantizedWeight)]
    handles = [layer.register_forward_hook(remember(name)) for name, layer in layers]
    ask(denoiser)
    for handle in handles:
        handle.remove()
    return found


def check_layers(denoiser: nn.Module, layers: dict[str, tuple[QuantizedWeight, Tensor]]) -> None:
    """Each against its fake one's numbers in float64."""
    for name, (layer, x) in layers.items():
        found = denoiser.get_submodule(name)
        assert isinstance(found, IntegerLayer), name
        hat, weight = layer.quantized_input(x).double(), layer.quantized_weight(torch.float32).double()
        bias = None if layer.bias is None else layer.quantized_bias().double()
        multiply = layer._conv_forward if isinstance(layer, nn.Conv2d) else linear
        exact, sizes = multiply(hat, weight, bias), multiply(hat.abs(), weight.abs(), None)
        assert ((found(x).double() - exact).abs() <= 1e-6 * (sizes + 1)).all(), name


def check_model(pipe, ask, draw, backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers within rounding, predictions but for values that rounding tips over the edge of a code, images by 40 dB."""
    denoiser = find_denoiser(pipe)[1]
    layers, fake, images = met(denoiser, ask), ask(denoiser), draw(pipe)
    lowered_here(pipe, backend, monkeypatch)
    found = ask(denoiser)
    check_layers(denoiser, layers)
    difference = (found - fake).abs()
    assert difference.median() <= 1e-5 * fake.std()
    assert difference.square().mean() <= 0.05 * fake.var()
    ratios = psnr(draw(pipe) / 255, images / 255)
    assert images.float().std() > 10
    assert (ratios >= 40).all(), ratios.tolist()


COUNT, STEPS = (3, 2) if GPU else (1, 1)
"""Images and steps: the interpreter is slow."""
TIMES = [10, 990, 400][:COUNT]
SEEDS = range(1, COUNT + 1)


@KERNELS
@torch.no_grad()
def test_a_unet_lowered_is_the_fake_one(backend, tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    # of this size: with more channels, 8 bits and random weights, fake images part by 30 dB where only the order of sums differs
    pipe = quantized_tiny(tiny_pipeline((8, 16)), weights=8).to(HERE)
    x = torch.randn(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(3)).to(HERE)
    when = torch.tensor(TIMES, device=HERE)
    check_model(pipe, lambda unet: unet(x, when).sample, lambda p: sample(p, SEEDS, STEPS), backend, monkeypatch)


@KERNELS
@pytest.mark.skipif(find_spec("transformers") is None, reason="the families' tests need transformers")
@pytest.mark.parametrize("options", [(), ("tokens",)], ids=["a grid for each step", "a grid for each token"])
@torch.no_grad()
def test_a_dit_lowered_is_the_fake_one(options: tuple[str, ...], backend, monkeypatch) -> None:
    from tests.families.quantized import quantized_of
    from tests.families.tiny import conditions_of

    pipe = copy.deepcopy(quantized_of("dit", *options, bits=8)[0]).to(HERE)
    x = torch.randn(COUNT, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(HERE)
    when, labels = torch.tensor(TIMES, device=HERE), torch.tensor([1, 7, 999][:COUNT], device=HERE)

    def ask(dit: nn.Module) -> Tensor:
        return dit(x, when, labels).sample

    check_model(pipe, ask, lambda p: sample(p, SEEDS, STEPS, conditions_of("dit")), backend, monkeypatch)
