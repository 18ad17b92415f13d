"""A split convolution against two plain ones, and through the whole life of a checkpoint."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn
from torch.nn.functional import conv2d

from tcaq.errors import PlanError
from tcaq.layers.insert import insert, quantized_layers
from tcaq.layers.modes import Mode, floating, observing, running
from tcaq.layers.split import SplitConv2d
from tcaq.models.denoiser import attach_clock
from tcaq.models.units import concatenations, default_plan, resolve
from tcaq.numerics.affine import fake_quantize, qparams
from tcaq.quantizers.clock import StepClock
from tcaq.recipes.quantize import quantize
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids, Plan, Rule
from tcaq.spec.recipe import Recipe
from tcaq.spec.steps import StepGroups

FOUR = AffineGrid(bits=4)


def split(conv: nn.Conv2d, where: int) -> SplitConv2d:
    grids = LayerGrids(name="layer", kind="conv", weight=FOUR, inputs=(FOUR,), split=where)
    return SplitConv2d.wrap(conv, grids, StepClock(StepGroups()))


def split_plan(unet: nn.Module) -> Plan:
    return Plan(
        rules=(Rule(match="*.conv_shortcut", weight=FOUR, input=FOUR, split=True), *default_plan(unet, 4, 4).rules)
    )


@pytest.fixture
def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(6, 5, 3, padding=1)


def test_in_float_it_is_the_original_bit_for_bit(conv):
    x = torch.randn(2, 6, 8, 8)
    layer = split(conv, 4)
    with running(layer, Mode.FLOAT):
        assert torch.equal(layer(x), conv(x))
    with running(layer, Mode.OBSERVE):
        torch.testing.assert_close(layer(x), conv(x))


def test_each_half_has_its_own_grids(conv):
    x = torch.randn(2, 6, 8, 8)
    x[:, 4:] *= 100  # as a skip connection may be
    layer, expected = split(conv, 4), conv.bias.detach().reshape(1, -1, 1, 1)
    for half, part, weight in (
        (layer.first, x[:, :4], conv.weight[:, :4]),
        (layer.second, x[:, 4:], conv.weight[:, 4:]),
    ):
        scale, zero = qparams(part.amin().reshape(1), part.amax().reshape(1), 4, False, False)
        half.input_quantizer.set_rows(scale, zero)
        flat = weight.detach().flatten(1)
        rows = qparams(flat.amin(1), flat.amax(1), 4, False, False)
        half.weight_quantizer.set_rows(*rows, weight.detach())
        hat = fake_quantize(flat, rows[0][:, None], rows[1][:, None], 0, 15).reshape(weight.shape)
        expected = expected + conv2d(fake_quantize(part, scale, zero, 0, 15), hat, padding=1)
    with running(layer, Mode.FAKE), torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("where", [0, 6, 9])
def test_a_split_outside_is_refused(conv, where):
    with pytest.raises(PlanError, match="'layer' cannot be split"):
        split(conv, where)


def test_the_halves_of_a_u_net_meet_where_its_concatenations_do(tiny_pipeline, monkeypatch):
    unet = tiny_pipeline().unet
    concatenate, seen = torch.cat, []

    def watch(tensors, dim=0):
        if dim == 1 and tensors[0].dim() == 4:
            seen.append([part.shape[1] for part in tensors])
        return concatenate(tensors, dim=dim)

    monkeypatch.setattr(torch, "cat", watch)
    with torch.no_grad():
        unet(torch.randn(1, 1, 16, 16), 10)
    joints = concatenations(unet)
    assert [hidden for hidden, _ in seen] == list(joints.values())
    assert [sum(pair) for pair in seen] == [unet.get_submodule(name).in_channels for name in joints]


def test_it_is_calibrated_saved_loaded_and_taken_out_again(tiny_pipeline, tmp_path):
    original = tiny_pipeline()
    grids = {rule.match: rule for rule in default_plan(original.unet, 4, 4).rules}
    plan = Plan(
        rules=(
            Rule(match="*.conv_shortcut", weight=FOUR, input=FOUR, split=True),
            *default_plan(original.unet, 4, 4).rules,
        )
    )
    assert grids
    recipe = Recipe.parse(
        {"calibration": {"images": 2, "steps": 2}, "reconstruction": {"iterations": 2, "inputs": 4, "batch": 2},
         "ranges": {"values": 100, "weight_candidates": 3, "input_candidates": 3}, "alignment": None, "network": None},
        where="test",
    )  # fmt: skip
    pipe = tiny_pipeline()
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([10, 700])
    quantize(pipe, recipe, tmp_path / "out", plan=plan)
    splits = [m for m in pipe.unet.modules() if isinstance(m, SplitConv2d)]
    assert len(splits) == len(concatenations(original.unet))
    assert all(m.first.input_quantizer.scale[0] != m.second.input_quantizer.scale[0] for m in splits)
    loaded = DDIMPipeline.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, t).sample, pipe.unet(x, t).sample)
    shape = original.unet.up_blocks[0].resnets[0].conv_shortcut.weight.shape
    plain = loaded.unet.dequantize()
    assert plain.up_blocks[0].resnets[0].conv_shortcut.weight.shape == shape
    with torch.no_grad():
        assert torch.isfinite(plain(x, t).sample).all()


def test_float_mode_of_a_split_model_is_bit_exact(tiny_pipeline):
    original, pipe = tiny_pipeline().unet, tiny_pipeline()
    insert(pipe.unet, resolve(pipe.unet, split_plan(original)), attach_clock(pipe.unet, StepGroups()))
    names = [name for name, _ in quantized_layers(pipe.unet)]
    assert "up_blocks.0.resnets.0.conv_shortcut.first" in names
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([10, 700])
    with torch.no_grad():
        expected = original(x, t).sample
        with floating(pipe.unet):
            assert torch.equal(pipe.unet(x, t).sample, expected)
        with observing(pipe.unet):
            torch.testing.assert_close(pipe.unet(x, t).sample, expected)
