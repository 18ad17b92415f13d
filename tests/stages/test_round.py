"""GPTQ over units: Hessians against recorded products, what is rounded sees what was rounded, resuming to the same bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcaq.layers.columns import equalized_input, input_columns
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.insert import quantized_layers
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import faking
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.units import Unit
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.recipe import Gptq
from tcaq.spec.steps import StepGroups
from tcaq.stages.call import Call
from tcaq.stages.draw import draw_parts
from tcaq.stages.round import Hessians, Rounder, apply_codes, round_layer

SPEC = Gptq(inputs=12, batch=4)


def make(scene, memory=1.0, **changes):
    return Rounder(
        scene.unet, scene.units, scene.trajectories, SPEC.model_copy(update=changes), seed=0, memory=memory
    )  # fmt: skip


def quantized(layer: nn.Module, bits: int = 4) -> QuantizedWeight:
    """A layer with a TCR vector, an input grid, and its weight rounded to nearest."""
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    grid = AffineGrid(bits=bits)
    grids = LayerGrids(name="layer", kind=kind, weight=grid, inputs=(AffineGrid(bits=8),))
    wrap = QuantizedLinear.wrap if kind == "linear" else QuantizedConv2d.wrap
    made = wrap(layer, grids, StepClock(StepGroups()))
    made.equalizer.copy_(torch.linspace(1.0, 3.0, len(made.equalizer)))
    made.input_quantizer.set_rows(torch.full((1,), 0.05), torch.full((1,), 128.0))
    weight = made.equalized_weight().detach()
    reach = weight.flatten(1).abs().amax(1)
    made.weight_quantizer.set_rows(2 * reach / (2**bits - 1), torch.full_like(reach, 2 ** (bits - 1)), weight)
    return made


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "dilated": (lambda: nn.Conv2d(4, 6, (3, 1), dilation=2, padding="same"), (3, 4, 8, 8)),
    "reflecting": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), groups=2), (3, 4, 8, 8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_columns_times_the_equalized_weight_are_what_the_layer_puts_out(kind):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = quantized(build())
    x = torch.randn(shape)
    columns = input_columns(layer, equalized_input(layer, x))
    weight = layer.weight_quantizer().flatten(1).unflatten(0, (layer.groups, -1))
    with torch.no_grad():
        output = layer(x).movedim(layer.CHANNEL_AXIS, -1).flatten(0, -2) - layer.bias
    products = (columns @ weight.transpose(1, 2)).movedim(0, 1).flatten(1)
    torch.testing.assert_close(products, output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("width", [4096, 5])
def test_hessians_are_those_of_the_quantized_input_and_bring_outputs_closer(kind, width, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("tcaq.stages.round.CHUNK", 600)  # several chunks an input
    build, shape = LAYERS[kind]
    layer = quantized(build())
    x = torch.randn(3, shape[1], *[1] * (len(shape) - 2)) + 0.3 * torch.randn(shape)  # neighbours go together
    hessians = Hessians(layer, width)
    hessians.add(x)
    hessians.add(-x)
    for group, columns in enumerate(input_columns(layer, equalized_input(layer, torch.cat([x, -x]))).double()):
        for run, total in zip(hessians.runs, hessians.sums, strict=True):
            own = columns[:, run]
            torch.testing.assert_close(total[group].double(), own.T @ own, rtol=1e-4, atol=1e-3)

    def error():
        weight = layer.weight_quantizer() - layer.equalized_weight().detach()
        columns = input_columns(layer, equalized_input(layer, torch.cat([x, -x])))
        products = columns @ weight.flatten(1).unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return float(products.square().sum())

    before = error()
    found = round_layer(layer, hessians, 0.01)
    assert error() < before
    if width == 4096:
        assert error() / before == pytest.approx(found["gptq"] / found["nearest"], rel=1e-3)


def test_each_layer_is_rounded_on_what_was_rounded_before_it(ready, monkeypatch):
    """The last unit's record against Hessians of the inputs that a plain pass of the quantized model gives its layers."""
    monkeypatch.setattr("tcaq.stages.round.CHUNK", 4000)  # a few samples at a time, of several step groups
    drawn = draw_parts(ready.trajectories, SPEC.inputs, 0)[0].split(SPEC.batch)
    with make(ready) as rounder:
        for unit in ready.units[:-1]:
            apply_codes(unit, rounder.round(unit.name))
        last = ready.units[-1]
        start = {name: layer.weight_quantizer.codes.clone() for name, layer in quantized_layers(last.module)}
        record = rounder.round(last.name)
    layer = last.module
    layer.weight_quantizer.codes.copy_(start[""])
    hessians = Hessians(layer, 4096)
    handle = layer.register_forward_pre_hook(lambda _, args: hessians.add(args[0]))
    with faking(ready.unet), torch.no_grad():
        for batch in drawn:
            batch(ready.unet)
    handle.remove()
    round_layer(layer, hessians, SPEC.damping)
    same = layer.weight_quantizer.integers() == _integers(layer, record.tensors[""])
    assert float(same.float().mean()) > 0.99  # sums of floats in another order may tip a tie
    assert record.meta["errors"][""]["gptq"] < record.meta["errors"][""]["nearest"]


def _integers(layer: QuantizedWeight, codes: torch.Tensor) -> torch.Tensor:
    before = layer.weight_quantizer.codes.clone()
    layer.weight_quantizer.codes.copy_(codes)
    integers = layer.weight_quantizer.integers()
    layer.weight_quantizer.codes.copy_(before)
    return integers


def test_rounding_is_the_same_when_activations_spill_and_comes_back(ready, tmp_path):
    units = ready.units[:4]
    start = {name: layer.weight_quantizer.codes.clone() for name, layer in weights(ready.unet)}
    records = []
    for memory in (1.0, 1e-9):
        for name, layer in weights(ready.unet):
            layer.weight_quantizer.codes.copy_(start[name])
        with make(ready, memory=memory) as rounder:
            records.append([rounder.round(unit.name) for unit in units])
    for unit, one, other in zip(units, *records, strict=True):
        assert one.digest == other.digest
        one.save(tmp_path / "unit.safetensors")
        after = {name: layer.weight_quantizer.codes.clone() for name, layer in weights(unit.module)}
        for _, layer in weights(unit.module):
            layer.weight_quantizer.codes.zero_()
        apply_codes(unit, type(one).load(tmp_path / "unit.safetensors"))
        assert all(torch.equal(layer.weight_quantizer.codes, after[name]) for name, layer in weights(unit.module))


def weights(module: nn.Module):
    return [(name, layer) for name, layer in quantized_layers(module) if isinstance(layer, QuantizedWeight)]


def test_a_layer_that_runs_twice_in_a_unit_is_seen_twice(ready):
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x))

    torch.manual_seed(0)
    unit = Unit("twice", Twice(quantized(nn.Linear(4, 4))))
    with make(ready) as rounder:
        rounder.units["twice"] = unit
        x = torch.randn(len(rounder.replay.parts[0]), 4)
        seen = []
        rounder.replay.inputs = lambda *_: Call.of((x,), {}, len(x))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Hessians, "add", lambda hessians, value: seen.append(len(value)))
            rounder.round("twice")
    assert seen == [4] * 6  # three batches, two inputs each
