"""Every family in integers: each layer equal to its fake one within rounding, and what stays fake says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tcaq
from tcaq.integer.layer import IntegerLayer
from tcaq.layers.attention import ProductProcessor
from tcaq.layers.insert import insert, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import attach_clock, clock_of, find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import sample
from tcaq.models.trajectories import predict
from tcaq.models.units import default_plan, resolve
from tcaq.spec.steps import StepGroups
from tcaq.stages.draw import draw_parts

from .quantized import quantized_of
from .test_execution import Stranger
from .tiny import FAMILIES, conditions_of

EVERY = pytest.mark.parametrize("name", FAMILIES)


def uneven(planned):
    """Products whose probabilities are on a log2 grid in some step group: all that is not in integers."""
    grids = {name: getattr(layer, "left_quantizer", None) for name, layer in planned.items()}
    return [name for name, grid in grids.items() if getattr(grid, "use_log2", torch.zeros(1)).any()]


def check_kept(lowering, planned):
    assert [row.name for row in lowering.kept] == uneven(planned)
    assert all(row.execution == "fake" and "log2 grid" in row.reason for row in lowering.kept)


def meetings(denoiser, inputs):
    """What each weighted layer met in one pass, and what it made of it."""
    found = {}

    def remember(name):
        return lambda layer, args, result: found.update({name: (layer, args[0], result)})

    weighted = [(n, layer) for n, layer in quantized_layers(denoiser) if isinstance(layer, QuantizedWeight)]
    handles = [layer.register_forward_hook(remember(name)) for name, layer in weighted]
    with torch.no_grad():
        inputs(denoiser)
    for handle in handles:
        handle.remove()
    return found


def sizes(layer, x):
    """The sum of the sizes of a layer's products: float sums are off by a few roundings of it."""
    given, weight = abs(layer.quantized_input(x).float()), abs(layer.quantized_weight(torch.float32))
    conv = isinstance(layer, nn.Conv2d)
    return layer._conv_forward(given, weight, None) if conv else torch.nn.functional.linear(given, weight)


def check_layers(denoiser, met, inputs, step):
    """Each integer layer against its fake one, at the timesteps of `inputs`; `step` is what a rounding is worth."""
    clock_of(denoiser).set(inputs.timestep)
    for name, (layer, x, expected) in met.items():
        found = denoiser.get_submodule(name)(x)
        assert isinstance(denoiser.get_submodule(name), IntegerLayer), name
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert (abs(found.float() - expected.float()) <= step * (sizes(layer, x) + 1)).all(), name


def led(denoiser, met, inputs, step):
    """What a lowered denoiser predicts when each layer hands on what its fake one made, and the largest share of a layer's values
    that were off by more than a rounding: those whose input tipped over the edge of a code.
    """
    shares = [0.0]

    def lead(layer, x, expected):
        def hand_on(_, __, found):
            off = abs(found.float() - expected.float()) > step * (sizes(layer, x) + 1)
            shares.append(float(off.double().mean()))
            return expected

        return hand_on

    handles = [denoiser.get_submodule(name).register_forward_hook(lead(*parts)) for name, parts in met.items()]
    prediction = inputs(denoiser)
    for handle in handles:
        handle.remove()
    return prediction, max(shares)


@EVERY
@torch.no_grad()
def test_layers_predictions_and_images_are_those_of_the_fake_model(name):
    pipe, trajectories = quantized_of(name, "split")
    denoiser = find_denoiser(pipe)[1]
    drawn = draw_parts(trajectories, 10**6, 0)[0]  # timesteps of several groups in one batch
    assert len(drawn.timestep.unique()) > 1
    planned = dict(quantized_layers(denoiser))
    met, expected = meetings(denoiser, drawn), predict(denoiser, trajectories)
    conditions = resolve_conditions(pipe, conditions_of(name))
    images = sample(pipe, (1, 2), 2, conditions).short()
    lowering = tcaq.lower(pipe)
    assert [row.name for row in lowering.layers] == list(planned)
    check_kept(lowering, planned)
    check_layers(denoiser, met, drawn, 1e-6)
    difference = (predict(denoiser, trajectories) - expected).abs()
    # where rounding tips a value over the edge of a code, what follows differs by a step: not so for most
    assert difference.median() <= 1e-5 * expected.std()
    assert difference.square().mean() <= 0.05 * expected.var()
    assert ((sample(pipe, (1, 2), 2, conditions).short() - images).abs() <= 2).double().mean() > 0.95


@pytest.mark.parametrize(("name", "bits"), [("sd", 4), ("dit", 8), ("pixart", 4), ("sd35", 8), ("flux", 4)])
@torch.no_grad()
def test_grids_for_each_token_run_in_integers(name, bits):
    pipe, trajectories = quantized_of(name, "tokens", bits=bits)
    denoiser = find_denoiser(pipe)[1]
    drawn = draw_parts(trajectories, 10**6, 0)[0]
    met = meetings(denoiser, drawn)
    tokens = [n for n, (layer, *_) in met.items() if type(layer.input_quantizer).__name__ == "TokenQuantizer"]
    expected, planned = predict(denoiser, trajectories), dict(quantized_layers(denoiser))
    fake = drawn(denoiser)
    check_kept(tcaq.lower(pipe), planned)
    assert {type(denoiser.get_submodule(n)).__name__ for n in tokens} == {"IntegerTokenLinear"}
    check_layers(denoiser, met, drawn, 1e-6)
    in_step, tipped = led(denoiser, met, drawn, 1e-6)
    assert ((in_step - fake).abs() <= 1e-5 * fake.std()).all()
    # at 4 bits attention puts out multiples of one step, many of which lie on an edge of a token's grid
    assert tipped < (0.2 if bits == 4 else 0.02)
    difference = predict(denoiser, trajectories) - expected
    # where no rounding tips a value over the edge of a code, nothing differs by more; else all that follows may, a little
    assert difference.abs().median() <= 1e-5 * expected.std() or tipped
    assert difference.square().mean() <= 0.05 * expected.var()


HALVES = [
    ("sd", torch.bfloat16), ("sd", torch.float16), ("pixart", torch.float16), ("sd35", torch.bfloat16), ("flux", torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
@torch.no_grad()
def test_half_precision_between_integer_layers(name, dtype):
    pipe, trajectories = quantized_of(name, "split", bits=8, dtype=dtype)
    denoiser = find_denoiser(pipe)[1]
    drawn = draw_parts(trajectories, 10**6, 0)[0]
    met, expected = meetings(denoiser, drawn), predict(denoiser, trajectories).float()
    planned = dict(quantized_layers(denoiser))
    check_kept(tcaq.lower(pipe), planned)
    # the fake layer's operands are rounded to half precision, the codes of the integer one are not
    check_layers(denoiser, met, drawn, 2 * torch.finfo(dtype).eps)
    found = predict(denoiser, trajectories)
    assert found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < 0.12


@pytest.mark.parametrize("name", ["sd", "sd35", "flux"])
@torch.no_grad()
def test_fused_attention_of_every_kind_of_processor(name):
    pipe, trajectories = quantized_of(name)
    denoiser = find_denoiser(pipe)[1]
    lowering = tcaq.lower(pipe, products="fused")
    assert {row.execution for row in lowering.kept} == {"float"}
    assert not any(isinstance(getattr(m, "processor", None), ProductProcessor) for m in denoiser.modules())
    assert torch.isfinite(predict(denoiser, trajectories)).all()


@torch.no_grad()
def test_a_denoiser_that_no_table_knows_is_lowered_layer_by_layer():
    torch.manual_seed(0)
    stranger, (pipe, _) = Stranger().eval(), quantized_of("dit")
    quantize_stranger(stranger)
    x, context = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    expected = stranger(x, torch.tensor(3), context)[0]
    pipe.transformer = stranger
    lowering = tcaq.lower(pipe)
    assert [(row.name, row.execution) for row in lowering.layers] == [("twice", "integer")]
    torch.testing.assert_close(stranger(x, torch.tensor(3), context)[0], expected)


def quantize_stranger(stranger):
    insert(stranger, resolve(stranger, default_plan(stranger, 4, 4)), attach_clock(stranger, StepGroups()))
    layer = stranger.twice
    layer.input_quantizer.set_rows(torch.tensor([0.3]), torch.tensor([7.0]))
    layer.weight_quantizer.set_rows(torch.full((4,), 0.1), torch.full((4,), 8.0), layer.float_weight().detach())
