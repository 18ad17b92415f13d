"""Quantized convolutions and linear layers against plain ones on explicitly quantized operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from tcaq.errors import CheckpointError
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.hold import holding_weights
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode
from tcaq.numerics.affine import qparams
from tcaq.numerics.equalize import tcr_vector
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.steps import StepGroups

WEIGHT, INPUT = AffineGrid(bits=4, signed=True, symmetric=True), AffineGrid(bits=5)
CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"groups": 2, "padding": 1},
    {"groups": 6},
]


def clock() -> StepClock:
    made = StepClock(StepGroups(boundaries=(500.0,)))
    made.set(torch.tensor([10, 900, 20]))
    return made


def calibrate(layer: QuantizedConv2d | QuantizedLinear) -> None:
    """A TCR vector that differs by channel, and grids that clip a little."""
    layer.equalizer.copy_(1 + 3 * torch.rand(layer.equalizer.shape))
    layer.input_quantizer.set_rows(torch.tensor([0.11, 0.2]), torch.tensor([15.0, 12.0]))
    weight = layer.equalized_weight().detach()
    flat = weight.flatten(1)
    layer.weight_quantizer.set_rows(*qparams(flat.amin(1), flat.amax(1), 4, True, True), weight)


def wrapped(plain: nn.Conv2d | nn.Linear) -> QuantizedConv2d | QuantizedLinear:
    conv = isinstance(plain, nn.Conv2d)
    grids = LayerGrids(name="layer", kind="conv" if conv else "linear", weight=WEIGHT, inputs=(INPUT,))
    layer = QuantizedConv2d.wrap(plain, grids, clock()) if conv else QuantizedLinear.wrap(plain, grids, clock())
    calibrate(layer)
    return layer


def quantized(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return ((torch.round(x / scale) + zero).clamp(low, high) - zero) * scale


def naive(layer: QuantizedConv2d | QuantizedLinear, x: Tensor, channel_axis: int) -> tuple[Tensor, Tensor]:
    """Q(x / r) * r sample by sample, and Q(W r) / r output channel by output channel."""
    shape = [1] * (x.dim() - 1)
    shape[channel_axis] = -1
    r = layer.equalizer.reshape(shape)
    table = layer.input_quantizer
    rows = (0, 1, 0)  # of the clock's timesteps
    inputs = [quantized(a, table.scale[g] * r, table.zero_point[g], 0, 31) for a, g in zip(x, rows, strict=True)]
    groups = getattr(layer, "groups", 1)
    of_group = layer.equalizer.chunk(groups)
    outputs = []
    for o, row in enumerate(layer.float_weight().detach()):
        gain = of_group[o * groups // layer.float_weight().shape[0]].reshape(-1, *[1] * (row.dim() - 1))
        scale = layer.weight_quantizer.scale[o]
        outputs.append(quantized(row * gain, scale, torch.tensor(0.0), -8, 7) / gain)
    return torch.stack(inputs), torch.stack(outputs)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4 if options.get("groups") != 6 else 12, 3, **options)
    x = torch.randn(3, 6, 9, 9)
    expected = plain(x)
    layer = wrapped(plain)
    assert isinstance(layer, QuantizedConv2d)
    for mode in (Mode.FLOAT, Mode.OBSERVE):
        layer.mode = mode
        assert torch.equal(layer(x), expected)
    layer.mode = Mode.FAKE
    inputs, weight = naive(layer, x, channel_axis=0)
    torch.testing.assert_close(layer.quantized_weight(torch.float32), weight, rtol=1e-6, atol=1e-7)
    if options.get("padding_mode") == "reflect":
        reference = conv2d(torch.nn.functional.pad(inputs, (1, 1, 1, 1), mode="reflect"), weight, plain.bias)
    else:
        geometry = {k: v for k, v in options.items() if k in ("stride", "padding", "dilation", "groups")}
        reference = conv2d(inputs, weight, plain.bias, **geometry)
    actual = layer(x)
    torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    assert (actual - expected).abs().max() > 1e-2  # four bits are felt


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 7)])
def test_linear(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(7, 4, bias=bias)
    x = torch.randn(shape)
    expected = plain(x)
    layer = wrapped(plain)
    assert isinstance(layer, QuantizedLinear)
    for mode in (Mode.FLOAT, Mode.OBSERVE):
        layer.mode = mode
        assert torch.equal(layer(x), expected)
    layer.mode = Mode.FAKE
    inputs, weight = naive(layer, x, channel_axis=-1)
    torch.testing.assert_close(layer(x), linear(inputs, weight, plain.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@torch.no_grad()
def test_moving_range_to_the_weight_keeps_the_function_and_spares_small_channels(kind: str) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 4, 3, padding=1) if kind == "conv" else nn.Linear(6, 4)
    sizes = torch.tensor([0.01, 1, 30, 2, 0.3, 100.0]).reshape(6, 1, 1)
    x = torch.randn(3, 6, 5, 5) * sizes
    plain.weight /= sizes if kind == "conv" else sizes.flatten()  # so that small channels matter
    x = x if kind == "conv" else x.flatten(2).transpose(1, 2)
    eight = AffineGrid(bits=8)
    grids = LayerGrids(name="layer", kind=kind, weight=eight, inputs=(eight,))
    layer = (QuantizedConv2d if kind == "conv" else QuantizedLinear).wrap(plain, grids, StepClock(StepGroups()))
    others = [axis for axis in range(x.dim()) if axis != layer.CHANNEL_AXIS % x.dim()]
    r = tcr_vector(x.abs().amax(others)[None], percentile=0.0, truncate=1e9)
    errors = []
    for vector in (torch.ones(6), r):
        layer.equalizer.copy_(vector)
        seen, weight = x / layer.gain(x.dim()), layer.equalized_weight()
        layer.input_quantizer.set_rows(*qparams(seen.min()[None], seen.max()[None], 8, False, False))
        flat = weight.flatten(1)
        layer.weight_quantizer.set_rows(*qparams(flat.amin(1), flat.amax(1), 8, False, False), weight)
        errors.append(float((layer(x) - plain(x)).norm() / plain(x).norm()))
    assert r.max() > 100
    assert errors[1] < 0.02
    assert errors[0] > 10 * errors[1]


@pytest.mark.parametrize("plain", [nn.Conv2d(4, 3, 3), nn.Linear(4, 3), nn.Linear(4, 3, bias=False)])
def test_parameters_are_shared_and_the_types_kept(plain: nn.Conv2d | nn.Linear) -> None:
    layer = wrapped(plain.eval())
    assert isinstance(layer, type(plain))
    assert layer.weight is plain.weight
    assert layer.weight.data_ptr() == plain.weight.data_ptr()
    assert layer.bias is plain.bias
    assert not layer.training
    assert {name for name, _ in layer.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert layer.extra_repr() == plain.extra_repr()


def test_without_its_float_weight_a_layer_runs_on_codes_and_says_what_is_gone() -> None:
    torch.manual_seed(0)
    layer = wrapped(nn.Linear(7, 4))
    x = torch.randn(3, 7)
    before = layer(x)
    layer.drop_float_weight()
    assert torch.equal(layer(x), before)
    assert "weight" not in layer.state_dict()
    layer.mode = Mode.FLOAT
    with pytest.raises(CheckpointError, match="holds only packed integer codes"):
        layer(x)


def test_while_rounding_is_learned_gradients_reach_the_rounding_and_the_scale() -> None:
    torch.manual_seed(0)
    layer = wrapped(nn.Conv2d(6, 4, 3))
    x = torch.randn(3, 6, 9, 9)
    (alpha,) = layer.weight_quantizer.begin_learning(layer.equalized_weight().detach(), trust=0.0)
    (gain,) = layer.input_quantizer.begin_learning()
    inputs, _ = naive(layer, x, channel_axis=0)
    torch.testing.assert_close(layer(x), conv2d(inputs, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert alpha.grad is not None
    assert gain.grad is not None
    assert (alpha.grad != 0).float().mean() > 0.9
    assert (gain.grad != 0).all()


def test_the_correction_of_the_bias_is_folded_before_anything_is_stored() -> None:
    layer = wrapped(nn.Linear(7, 4))
    x, stored = torch.randn(3, 7), set(layer.state_dict())
    before = layer(x)
    layer.bias_correction = torch.arange(4.0)
    torch.testing.assert_close(layer(x), before + torch.arange(4.0))
    assert set(layer.state_dict()) == stored
    layer.drop_float_weight()
    torch.testing.assert_close(layer(x), before + torch.arange(4.0))


def test_what_is_no_buffer_moves_with_its_layer() -> None:
    layer = wrapped(nn.Linear(7, 4))
    x, layer.mode, layer.bias_correction = torch.randn(3, 7), Mode.FAKE, torch.arange(4.0)
    with torch.no_grad(), holding_weights(layer):
        expected = layer(x).double()
        layer.double()
        assert (layer.held.dtype, layer.bias_correction.dtype) == (torch.float64, torch.float64)
        torch.testing.assert_close(layer(x.double()), expected)
        layer.to("meta")
        assert layer.held.is_meta
        assert layer.bias_correction.is_meta
        assert layer(x.double().to("meta")).is_meta


def test_a_correction_that_is_being_learned_stays_its_optimizers_when_its_layer_moves() -> None:
    layer = wrapped(nn.Linear(7, 4))
    (learned,) = layer.learn_bias()
    optimizer = torch.optim.SGD([learned], lr=1.0)
    layer.double()
    layer(torch.randn(3, 7).double()).sum().backward()
    optimizer.step()
    layer.end_learning()
    torch.testing.assert_close(layer.bias_correction, torch.full((4,), -3.0, dtype=torch.float64))


def test_the_dtype_of_the_input_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7)
    layer, half = wrapped(nn.Linear(7, 4)), wrapped(nn.Linear(7, 4).to(torch.bfloat16))
    half.load_state_dict(layer.state_dict(), strict=True)
    actual = half(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), layer(x.bfloat16().float()), rtol=0.03, atol=0.03)


def test_held_weights_change_no_bit_and_are_let_go() -> None:
    layer = wrapped(nn.Conv2d(6, 4, 3))
    layer.mode = Mode.FAKE
    x = torch.randn(3, 6, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        with holding_weights(layer):
            assert layer.held is not None
            assert torch.equal(layer(x), expected)
        assert layer.held is None
        layer.weight_quantizer.scale.mul_(2)
        assert not torch.equal(layer(x), expected)
