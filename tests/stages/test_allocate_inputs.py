"""Sensitivity of predictions to rounded inputs against predictions with rounded inputs, and the widths that follow."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.modes import observing
from tcaq.models.denoiser import attach_clock
from tcaq.models.trajectories import Trajectories
from tcaq.numerics.affine import fake_quantize, qparams
from tcaq.records import Record
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.recipe import Allocation
from tcaq.spec.steps import StepGroups
from tcaq.stages.allocate_inputs import allocate_inputs, apply_input_widths
from tcaq.stages.sensitivity import draw_batches, mean_squares

TIMES = torch.tensor([900, 500, 100])
SPANS = torch.tensor([2.0, 4.0, 9.0])
"""How far the grids reach in each step group: clipped a little, covered, and coarse."""


class Sum(nn.Module):
    """Adds what convolutions make of x_t, all of which read the same tensor, each with a gain and a TCR vector of its own."""

    def __init__(self, gains: dict[str, float], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gains = gains
        clock = attach_clock(self, StepGroups.of("per-step", TIMES.tolist()))
        grids = LayerGrids(name="", kind="conv", weight=AffineGrid(bits=8), inputs=(AffineGrid(bits=4),))
        for i, name in enumerate(gains):
            layer = QuantizedConv2d.wrap(nn.Conv2d(channels, channels, 3, padding=1), grids, clock)
            layer.equalizer.copy_(torch.linspace(0.5, 1.5 + i, channels))
            self.register_module(name, layer)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        parts = [gain * self.get_submodule(name)(sample) for name, gain in self.gains.items()]
        return torch.stack(parts).sum(dim=0)

    def search(self) -> Record:
        tables = {}
        for name in self.gains:
            bits = self.get_submodule(name).input_quantizer.grid.bits
            found = qparams(-SPANS, SPANS, bits, signed=False, symmetric=False)
            tables |= dict(zip((f"{name}|input|scale", f"{name}|input|zero_point"), found, strict=True))
        return Record(tables)

    def allocate(self, spec: Allocation, seed: int = 0) -> Record:
        given = Trajectories(torch.randn(3, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0)), TIMES)
        self.given = given
        return allocate_inputs(self, given, list(self.gains), spec, self.search, seed)


def by_hand(x: Tensor, when: Tensor, bits: int, vector: Tensor) -> Tensor:
    span = SPANS[torch.searchsorted(torch.tensor([300.0, 700.0]), when.float(), right=True)]
    scale, zero = qparams(-span, span, bits, signed=False, symmetric=False)
    r = vector.reshape(1, -1, 1, 1)
    rows = (table.reshape(-1, 1, 1, 1) for table in (scale, zero))
    return fake_quantize(x / r, *rows, 0, 2**bits - 1) * r


@torch.no_grad()
def measured(model: Sum, spec: Allocation, bits: int, name: str) -> float:
    """The squared error of predictions with one input rounded, over that with all at 4 bits, mean over bands and inputs."""
    one, every, calls = [], [], []
    for part in draw_batches(model.given, spec, 0):
        given = part[:]
        x, when = given.sample, given.timestep

        def moved(layer: str, width: int, x: Tensor = x, when: Tensor = when) -> Tensor:
            conv = model.get_submodule(layer)
            error = by_hand(x, when, width, conv.equalizer) - x
            return model.gains[layer] * conv._conv_forward(error, conv.weight, None)

        one.append(mean_squares(moved(name, bits).double()))
        every.append(mean_squares(sum(moved(layer, 4) for layer in model.gains).double()))
        calls.append(part.calls)
    call, start = torch.cat(calls), torch.cat(every)
    unit = torch.stack([start[call == c].mean(dim=0) for c in range(3)])
    return float((torch.cat(one) / unit[call]).mean())


def test_where_predictions_are_linear_it_is_the_error_that_rounding_makes():
    model, spec = Sum({"a": 1.0, "b": 0.3}), Allocation(bits=(3, 4, 6), inputs=48, batch=1)
    runs = [model.allocate(spec, seed).tensors["sensitivity"] for seed in range(12)]
    mean = torch.stack(runs).mean(dim=0)
    for i, name in enumerate(model.gains):
        for j, bits in enumerate(spec.bits):
            assert float(mean[i, j]) == pytest.approx(measured(model, spec, bits, name), rel=0.2)


def test_what_costs_more_gets_more_bits_and_products_are_what_bits_are_counted_in():
    model = Sum({"loud": 5.0, "usual": 1.0, "quiet": 0.2})
    record = model.allocate(Allocation(bits=(2, 3, 4, 5, 6, 8), inputs=48))
    loud, usual, quiet = record.tensors["bits"].tolist()
    assert loud > usual > quiet
    assert loud + usual + quiet <= 12
    assert record.tensors["sizes"].tolist() == [8 * 8 * 4 * 4 * 9] * 3  # pixels, outputs, inputs, taps


def test_the_model_is_what_it_was_and_the_choice_is_applied():
    model = Sum({"loud": 5.0, "quiet": 0.2})
    model.loud.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = model.allocate(Allocation(bits=(2, 4, 6), inputs=12))
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p.requires_grad for p in (model.loud.weight, model.quiet.weight)] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert [model.get_submodule(n).input_quantizer.grid.bits for n in model.gains] == [4, 4]
    apply_input_widths(model, dict(zip(record.meta["layers"], record.tensors["bits"].tolist(), strict=True)))
    quantizers = [model.get_submodule(n).input_quantizer for n in model.gains]
    assert [(q.grid.bits, q.low, q.high) for q in quantizers] == [(6, 0, 63), (2, 0, 3)]


def test_inputs_that_x_t_does_not_reach_count_as_well():
    """A text's projection reads what no gradient comes through."""

    class Conditioned(Sum):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            text = torch.ones_like(sample) * 0.37
            return self.a(sample) + 5 * self.b(text)

    model = Conditioned({"a": 1.0, "b": 1.0})
    record = model.allocate(Allocation(bits=(2, 4, 6), inputs=12))
    assert float(record.tensors["sensitivity"][1, 0]) > 0
    with observing(model):  # and hooks are gone
        model(torch.zeros(1, 4, 8, 8), torch.tensor([500]))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in (model.a, model.b))


def test_no_pass_keeps_its_activations_until_a_collection_of_garbage():
    """A tensor whose hook refers to itself would: every batch's inputs of all layers, at full size gigabytes."""

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    model = Sum({"a": 1.0, "b": 0.5})
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        model.allocate(Allocation(bits=(2, 4, 6), inputs=48, batch=1))
        left = tensors() - before
    finally:
        gc.enable()
    assert left < 48
