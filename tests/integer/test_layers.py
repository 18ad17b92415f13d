"""Integer layers against the fake layers that they stand in for, element by element."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tcaq.errors import CheckpointError
from tcaq.integer.backend import Backend
from tcaq.integer.build import NoKernel, integer_layer
from tcaq.integer.cpu import CPU
from tcaq.integer.cuda_triton import TRITON
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import floating
from tcaq.numerics.affine import qparams
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import set_widths
from tcaq.spec.grid import AffineGrid, TokenGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.steps import StepGroups

from .places import EVERYWHERE

CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"groups": 2, "padding": 1},
]
BITS = [(2, 8), (4, 4), (7, 8), (8, 2), (8, 8)]
TIMES = {"one group": torch.tensor([900]), "mixed": torch.tensor([10, 900, 20])}


def quantized(
    plain: nn.Conv2d | nn.Linear, weight: AffineGrid, inputs: AffineGrid
) -> QuantizedConv2d | QuantizedLinear:
    """A TCR vector that differs by channel, grids that clip, zero points off the middle, one channel of positive weights alone."""
    plain = copy.deepcopy(plain)  # several tests are given the same, and move it
    clock = StepClock(StepGroups(boundaries=(500.0,)))
    conv = isinstance(plain, nn.Conv2d)
    grids = LayerGrids(name="layer", kind="conv" if conv else "linear", weight=weight, inputs=(inputs,))
    layer = QuantizedConv2d.wrap(plain, grids, clock) if conv else QuantizedLinear.wrap(plain, grids, clock)
    plain.weight.data[0].abs_()
    layer.equalizer.copy_(1 + 3 * torch.rand(layer.equalizer.shape))
    quantizer, span = layer.input_quantizer, 2**inputs.bits
    zero = torch.tensor([0.4, 0.6]).mul(span).round() + quantizer.low
    quantizer.set_rows(torch.tensor([1.1, 1.7]) / span, zero)
    rows = layer.equalized_weight().detach()
    flat = rows.flatten(1)
    layer.weight_quantizer.set_rows(
        *qparams(flat.amin(1), flat.amax(1), weight.bits, weight.signed, weight.symmetric), rows
    )
    return layer


def product(layer: QuantizedConv2d | QuantizedLinear, x: Tensor, weight: Tensor) -> Tensor:
    return layer._conv_forward(x, weight, None) if isinstance(layer, QuantizedConv2d) else x @ weight.T


def bound(layer: QuantizedConv2d | QuantizedLinear, x: Tensor) -> Tensor:
    """How far float sums may be off: the sum of the products' sizes times a few roundings."""
    hat, weight = layer.quantized_input(x).double().abs(), layer.quantized_weight(torch.float32).double().abs()
    return 1e-6 * product(layer, hat, weight) + 1e-6


@torch.no_grad()
def check(
    layer: QuantizedConv2d | QuantizedLinear, x: Tensor, place: tuple[Backend, str], when: Tensor, half: float = 0.0
) -> Tensor:
    """Against the fake layer's numbers multiplied in float64; sums may be off by a few roundings of the products' sizes.

    Args: half: a rounding of the output's dtype. Returns: what was found.
    """
    backend, device = place
    layer, x = layer.to(device), x.to(device)
    layer.input_quantizer.clock.set(when.to(device))
    integer = integer_layer(layer, backend)
    found = integer(x)
    if x.dim() == 4 and isinstance(
        layer, nn.Conv2d
    ):  # some kernels take another way where channels lie beside each other
        torch.testing.assert_close(
            integer(x.contiguous(memory_format=torch.channels_last)), found, rtol=1e-5, atol=1e-5
        )
    hat, weight = layer.quantized_input(x).double(), layer.quantized_weight(torch.float32).double()
    if x.dtype != torch.float32:  # whose fake layer rounds its codes' values, too
        hat = layer.quantized_input(x.float()).double()
    bias = layer.quantized_bias()
    shift = 0.0 if bias is None else bias.double().reshape(-1, *[1] * (2 * isinstance(layer, nn.Conv2d)))
    exact = product(layer, hat, weight) + shift
    assert (found.shape, found.dtype, found.device.type) == (exact.shape, x.dtype, device)
    assert ((found.double() - exact).abs() <= bound(layer, x) + half * exact.abs()).all()
    return found


@EVERYWHERE
@pytest.mark.parametrize("when", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_equals_its_fake_one(options: dict[str, Any], bits: tuple[int, int], when: Tensor, place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(6, 8, 3, **options), AffineGrid(bits=bits[0]), AffineGrid(bits=bits[1]))
    if layer.groups > 1 and place[0] is not CPU:
        with pytest.raises(NoKernel, match="in 2 groups has no"):
            integer_layer(layer, place[0])
    else:
        check(layer, torch.randn(3, 6, 9, 9), place, when)


@EVERYWHERE
@pytest.mark.parametrize("when", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7)], ids=str)
def test_a_linear_layer_equals_its_fake_one(shape: tuple[int, ...], bits: tuple[int, int], when: Tensor, place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(7, 4), AffineGrid(bits=bits[0]), AffineGrid(bits=bits[1]))
    check(layer, torch.randn(shape), place, when)


@EVERYWHERE
def test_tokens_of_an_image_need_no_copy_in_another_order(place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(7, 4), AffineGrid(bits=8), AffineGrid(bits=8))
    check(layer, torch.randn(3, 7, 5).transpose(1, 2), place, TIMES["mixed"])


@EVERYWHERE
@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_images_with_channels_last_or_gaps(options: dict[str, Any], place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(6, 8, 3, **options), AffineGrid(bits=8), AffineGrid(bits=8))
    x = torch.randn(3, 6, 9, 18)
    last = x[..., :9].contiguous(memory_format=torch.channels_last)
    outputs = [check(layer, part, place, TIMES["mixed"]) for part in (last, x[..., ::2], x[..., :9].transpose(2, 3))]
    if place[0] is TRITON:
        assert outputs[0].is_contiguous(memory_format=torch.channels_last)
        assert outputs[1].is_contiguous()


@EVERYWHERE
@pytest.mark.parametrize(
    "weight", [AffineGrid(bits=8, signed=True, symmetric=True), AffineGrid(bits=8, symmetric=True)], ids=str
)
def test_signed_and_symmetric_grids(weight: AffineGrid, place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(16, 8, 3, padding=1), weight, AffineGrid(bits=8, signed=True))
    check(layer, torch.randn(3, 16, 9, 9), place, TIMES["mixed"])


@EVERYWHERE
@pytest.mark.parametrize("when", TIMES.values(), ids=TIMES.keys())
@pytest.mark.parametrize(
    "inputs", [AffineGrid(bits=3, wider=(8,)), AffineGrid(bits=3, wider=(8,), signed=True)], ids=str
)
@pytest.mark.parametrize("plain", [nn.Conv2d(6, 8, 3, padding=1), nn.Linear(9, 8)], ids=str)
def test_rows_of_different_widths_equal_their_fake_ones(
    plain: nn.Module, inputs: AffineGrid, when: Tensor, place
) -> None:
    torch.manual_seed(0)
    layer = quantized(plain, AffineGrid(bits=4), inputs)
    spread_widths(layer, inputs)
    check(layer, torch.randn(3, 6, 9, 9), place, when)


def spread_widths(layer: QuantizedConv2d | QuantizedLinear, inputs: AffineGrid) -> None:
    """8 bits below t = 500, 3 from there on, clipping at either end of both."""
    set_widths(layer, torch.tensor([8, 3]))
    low, high = layer.input_quantizer.limits
    layer.input_quantizer.set_rows(3.0 / (high - low), low + torch.tensor([0.4, 0.6]).mul(high - low).round())


@EVERYWHERE
def test_a_corrected_bias_is_carried_over(place) -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(7, 4), AffineGrid(bits=4), AffineGrid(bits=8))
    layer.bias_correction = torch.randn(4, device=place[1])
    check(layer, torch.randn(3, 7), place, TIMES["mixed"])


@EVERYWHERE
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
@pytest.mark.parametrize(
    ("plain", "shape"), [(nn.Conv2d(6, 8, 3), (3, 6, 9, 9)), (nn.Linear(9, 8), (3, 4, 9))], ids=str
)
def test_half_precision_glue_keeps_its_dtype(plain, shape, dtype: torch.dtype, step: float, place) -> None:
    torch.manual_seed(0)
    layer = quantized(plain, AffineGrid(bits=8), AffineGrid(bits=8))
    cut_off = place == (TRITON, "cpu")  # what the interpreter does to bfloat16, where a GPU rounds
    check(layer, torch.randn(shape).to(dtype), place, TIMES["mixed"], 2 * step if cut_off else step)


def test_float_mode_is_refused() -> None:
    layer = integer_layer(quantized(nn.Linear(7, 4), AffineGrid(bits=4), AffineGrid(bits=8)), CPU)
    with floating(layer), pytest.raises(CheckpointError, match="keeps no float weight"):
        layer(torch.randn(3, 7))


def test_step_groups_are_read_from_the_device_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = integer_layer(quantized(nn.Linear(7, 4), AffineGrid(bits=4), AffineGrid(bits=8)), CPU)
    read, reading = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: read.append(tensor) or reading(tensor))
    outputs = []
    for when in (10.0, 900.0):
        layer.clock.set(when)
        outputs.append([layer(torch.ones(3, 7)) for _ in range(2)])
        assert torch.equal(*outputs[-1])
    assert len(read) == 2
    assert not torch.equal(outputs[0][0], outputs[1][0])


@pytest.mark.parametrize("inputs", [AffineGrid(bits=8), TokenGrid(bits=8)], ids=["steps", "token"])
def test_an_input_on_another_device_is_refused(inputs: AffineGrid | TokenGrid) -> None:
    grids = LayerGrids(name="layer", kind="linear", weight=AffineGrid(bits=4), inputs=(inputs,))
    layer = integer_layer(QuantizedLinear.wrap(nn.Linear(7, 4), grids, StepClock(StepGroups())), CPU)
    with pytest.raises(CheckpointError, match="lowered for cpu, its input is on meta; lower after moving"):
        layer(torch.randn(3, 7, device="meta"))


def test_models_with_different_weights_have_different_state() -> None:
    torch.manual_seed(0)
    one, two = (integer_layer(quantized(nn.Linear(7, 4), AffineGrid(bits=4), AffineGrid(bits=8)), CPU) for _ in "12")
    assert not torch.equal(one.state_dict()["fingerprint"], two.state_dict()["fingerprint"])


def test_where_no_form_is_exact_there_is_no_kernel() -> None:
    layer = quantized(nn.Linear(7, 4), AffineGrid(bits=4), AffineGrid(bits=8))
    careful = Backend(CPU.missing, CPU.conv, CPU.linear, CPU.conv_problem, lambda shape, span: f"no luck with {shape}")
    with pytest.raises(NoKernel, match=r"no luck with \(4, 7\)"):
        integer_layer(layer, careful)
