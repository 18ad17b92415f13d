"""Units come in execution order, traced, and together hold every quantized layer once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcaq.errors import PlanError
from tcaq.layers.insert import insert, list_layers, quantized_layers
from tcaq.models.denoiser import attach_clock
from tcaq.models.units import default_plan, execution_order, resolve
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import Plan, Rule
from tcaq.spec.steps import StepGroups


@pytest.fixture
def inserted(tiny_pipeline):
    unet = tiny_pipeline().unet
    insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, StepGroups()))
    return unet


def run(unet):
    with torch.no_grad():
        unet(torch.zeros(1, 1, 16, 16), torch.tensor([5]))


def test_order_is_the_order_of_execution(inserted):
    units = execution_order(inserted, lambda: run(inserted))
    reached = []
    handles = [u.module.register_forward_hook(lambda *_, name=u.name: reached.append(name)) for u in units]
    run(inserted)
    for handle in handles:
        handle.remove()
    assert [u.name for u in units] == reached
    names = [u.name for u in units]
    # the module tree lists up_blocks before mid_block; the forward pass does not
    assert names.index("mid_block.resnets.1") < names.index("up_blocks.0.resnets.0")
    assert names[-1] == "conv_out"


def test_units_cover_every_quantized_layer_once(inserted):
    units = execution_order(inserted, lambda: run(inserted))
    covered = [id(layer) for unit in units for _, layer in quantized_layers(unit.module)]
    assert sorted(covered) == sorted(id(layer) for _, layer in quantized_layers(inserted))


def test_default_plan_protects_edges_and_time(tiny_pipeline):
    unet = tiny_pipeline().unet
    table = {layer.name: layer for layer in resolve(unet, default_plan(unet, 4, 6)).layers}
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert (table[name].weight.bits, table[name].inputs[0].bits) == (8, 8)
    projection = table["mid_block.resnets.0.time_emb_proj"]
    assert (projection.weight.bits, projection.inputs[0].bits) == (4, 8)
    inner = table["mid_block.resnets.0.conv1"]
    assert (inner.weight.bits, inner.inputs[0].bits) == (4, 6)
    mix = table["mid_block.attentions.0.mix"]
    assert [str(grid) for grid in mix.inputs] == ["daq6", "auint6"]
    assert len(table) == len(list_layers(unet))


def test_unknown_architecture_takes_every_layer_as_a_unit():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, sample, timestep):
            return self.second(self.first(sample))

    net = Net()
    insert(net, resolve(net, default_plan(net, 8, 8)), attach_clock(net, StepGroups()))
    order = execution_order(net, lambda: net(torch.zeros(1, 3), torch.tensor(0)))
    assert [unit.name for unit in order] == ["first", "second"]


def test_a_user_rule_that_matches_nothing_is_refused(tiny_pipeline):
    unet = tiny_pipeline().unet
    grid = AffineGrid(bits=8)
    rules = (Rule(match="conv_inn", weight=grid, input=grid), *default_plan(unet, 4, 4).rules)
    with pytest.raises(PlanError, match="'conv_inn' matches no layer"):
        resolve(unet, Plan(rules=rules))
