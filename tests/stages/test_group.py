"""Learned groups find the change points that were planted."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from tcaq.layers.insert import insert, quantized_layers
from tcaq.models.denoiser import attach_clock, clock_of
from tcaq.models.sampler import Trajectories
from tcaq.models.units import resolve
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import Plan, Rule
from tcaq.spec.recipe import Grouping, RangeSearch
from tcaq.spec.steps import StepGroups
from tcaq.stages.group import Mixture, group, uniform_classes
from tcaq.stages.observe import observe
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights
from tcaq.stages.select import probability_quantizers
from tests.stages.conftest import build

STEPS = 12
SEARCH = RangeSearch(values=2000, weight_candidates=20, input_candidates=20)


class Toy(nn.Module):
    """Two convolutions without a norm: what comes in large stays large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.conv2(torch.relu(self.conv1(sample))))


def scene(sizes: list[float]):
    """A toy whose inputs have these sizes along the trajectory, every layer at 4-bit inputs and 8-bit weights."""
    torch.manual_seed(0)
    toy = Toy()
    timesteps = torch.linspace(950, 50, STEPS)
    samples = torch.randn(STEPS, 16, 1, 8, 8) * torch.tensor(sizes).reshape(-1, 1, 1, 1, 1)
    trajectories = Trajectories(samples, timesteps)
    plan = Plan(rules=(Rule(match="*", weight=AffineGrid(bits=8), input=AffineGrid(bits=4)),))
    insert(toy, resolve(toy, plan), attach_clock(toy, StepGroups.of("per-step", timesteps.tolist())))
    ranges = observe(toy, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(toy, scale_weights(toy, ranges, SEARCH))
    return toy, trajectories, ranges


def test_a_planted_change_point_is_found():
    sizes = [8.0] * 4 + [0.5] * 8  # equal halves would cut after the sixth step
    toy, trajectories, ranges = scene(sizes)
    spec = Grouping(groups=2, iterations=150, inputs=192, batch=48)
    record = group(toy, trajectories, ranges, SEARCH, spec, 0)
    start, classes = record.tensors["start"], record.tensors["classes"]
    assert start.tolist() == [1] * 6 + [0] * 6
    assert classes.tolist() == [1] * 4 + [0] * 8
    losses = record.meta["losses"]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert all(parameter.requires_grad for parameter in toy.parameters())
    apply_input_scales(toy, scale_inputs(toy, ranges, SEARCH, lambda _: classes))
    rows = toy.conv1.input_quantizer.scale
    assert len(rows) == STEPS  # a row a step, but only two of them differ; groups ascend in t
    assert rows[:8].unique().numel() == rows[8:].unique().numel() == 1
    assert float(rows[-1]) > 8 * float(rows[0])


def test_the_start_is_contiguous_groups_of_equal_size():
    timesteps = torch.linspace(950, 50, STEPS)
    assert uniform_classes(timesteps, 3).tolist() == [2] * 4 + [1] * 4 + [0] * 4
    assert uniform_classes(timesteps, 20).tolist() == list(range(STEPS - 1, -1, -1))  # no more groups than steps


def test_a_mixture_is_the_mean_of_the_groups_scales_by_their_shares():
    toy, trajectories, ranges = scene([4.0] * 6 + [1.0] * 6)
    start = uniform_classes(trajectories.timesteps, 2)
    apply_input_scales(toy, scale_inputs(toy, ranges, SEARCH, lambda _: start))
    quantizer = dict(quantized_layers(toy))["conv1"].operands["input"]
    low, high = float(quantizer.scale[0]), float(quantizer.scale[-1])
    of_step = torch.searchsorted(clock_of(toy).boundaries, trajectories.timesteps, right=True)
    shares = torch.full((STEPS, 2), 0.5)
    shares[0] = torch.tensor([0.25, 0.75])
    x, t = torch.randn(2, 1, 8, 8), trajectories.timesteps[[0, 5]]
    Mixture(quantizer, start, of_step).mix(shares)
    clock_of(toy).set(t)
    found = quantizer(x)
    quantizer.log_gain = None
    for sample, scale in zip((0, 1), (0.25 * low + 0.75 * high, 0.5 * low + 0.5 * high), strict=True):
        codes = found[sample] / scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)


def test_attention_has_grids_of_its_own_while_groups_are_learned(tiny_pipeline):
    scene = build(tiny_pipeline())
    apply_weight_scales(scene.unet, scale_weights(scene.unet, scene.ranges, SEARCH))
    sums: list[torch.Tensor] = []
    for quantizer in probability_quantizers(scene.unet).values():
        quantizer.register_forward_hook(
            lambda _, args, out: sums.append((out.sum(-1) / args[0].sum(-1)).mean().detach())
        )
    spec = Grouping(groups=2, iterations=2, inputs=8, batch=4)
    group(scene.unet, scene.trajectories, scene.ranges, SEARCH, spec, 0)
    assert sums
    # over 64 positions a grid from 0 to 1 with 4 bits would round nearly every probability to zero
    assert all(0.7 < float(found) < 1.3 for found in sums)
