"""Sensitivity of predictions to rounded weights against predictions with rounded weights, and the widths that follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcaq.models.trajectories import Trajectories
from tcaq.spec.grid import AffineGrid
from tcaq.spec.recipe import Allocation, RangeSearch
from tcaq.stages.allocate import Candidate, allocate, starting_errors
from tcaq.stages.sensitivity import draw_batches, mean_squares

TIMES = torch.tensor([900, 500, 100])
RANGES = RangeSearch(weight_candidates=10)
GRID = AffineGrid(bits=4)


class Sum(nn.Module):
    """Adds what convolutions make of x_t, each with a gain; every one moves the prediction exactly as its weight moves."""

    def __init__(self, gains: dict[str, float], channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gains = gains
        for name in gains:
            self.register_module(name, nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        # louder at small t, as the errors of denoisers are
        loud = 1 + 1000 / (timestep.reshape(-1, 1, 1, 1) + 1)
        parts = [gain * self.get_submodule(name)(sample) for name, gain in self.gains.items()]
        return loud * torch.stack(parts).sum(dim=0)


def trajectories(images: int = 16) -> Trajectories:
    return Trajectories(torch.randn(3, images, 4, 8, 8, generator=torch.Generator().manual_seed(0)), TIMES)


@torch.no_grad()
def measured(model: nn.Module, given: Trajectories, spec: Allocation, bits: int, name: str) -> float:
    """The squared error of predictions with one weight rounded, over that with all at 4 bits, mean over bands and inputs."""
    weights = [Candidate.of(model, layer, GRID, spec.bits, RANGES) for layer in model.gains]
    drawn = draw_batches(given, spec, 0)
    start = starting_errors(model, drawn, weights)
    weight = model.get_submodule(name).weight
    found = 0.0
    for part in drawn:
        inputs = part[:]
        before = inputs(model)
        kept, weight.data = weight.data, weights[list(model.gains).index(name)].rounded(bits)
        error = mean_squares((inputs(model) - before).double())
        weight.data = kept
        found += float((error / start[part.calls]).mean(dim=1).sum())
    return found / spec.inputs


def test_where_predictions_are_linear_in_weights_it_is_the_error_that_rounding_makes():
    model, given = Sum({"a": 1.0, "b": 0.3}), trajectories()
    spec = Allocation(bits=(2, 3, 6), inputs=48, batch=1)
    # 48 inputs have a chi-square of 48 degrees of freedom, 20 %: many seeds together say whether the mean is right
    grids = dict.fromkeys(model.gains, GRID)
    runs = [allocate(model, given, grids, spec, RANGES, seed).tensors["sensitivity"] for seed in range(12)]
    mean = torch.stack(runs).mean(dim=0)
    for i, name in enumerate(model.gains):
        for j, bits in enumerate(spec.bits):
            assert float(mean[i, j]) == pytest.approx(measured(model, given, spec, bits, name), rel=0.2)


def test_the_plans_own_width_comes_to_one_together():
    model = Sum({"a": 1.0, "b": 0.5, "c": 2.0})
    spec = Allocation(bits=(2, 4, 8), inputs=48, batch=1)
    record = allocate(model, trajectories(), dict.fromkeys(model.gains, GRID), spec, RANGES, 0)
    assert float(record.tensors["sensitivity"][:, 1].sum()) == pytest.approx(1.0, rel=0.35)


def test_what_costs_more_gets_more_bits_in_the_same_size():
    model = Sum({"loud": 5.0, "usual": 1.0, "quiet": 0.2})
    record = allocate(model, trajectories(), dict.fromkeys(model.gains, GRID), Allocation(inputs=48), RANGES, 0)
    loud, usual, quiet = record.tensors["bits"].tolist()
    assert loud > usual > quiet
    assert loud + usual + quiet <= 12
    assert record.meta == {"layers": ["loud", "usual", "quiet"], "widths": [2, 3, 4, 5, 6, 8]}


def test_a_mean_of_its_own_is_kept():
    model = Sum({"a": 1.0, "b": 1.0})
    spec = Allocation(inputs=48, mean=2.6)
    bits = allocate(model, trajectories(), dict.fromkeys(model.gains, GRID), spec, RANGES, 0).tensors["bits"]
    assert sorted(bits.tolist()) == [2, 3]


def test_the_model_is_what_it_was():
    model = Sum({"a": 1.0, "b": 0.5})
    model.b.weight.requires_grad_(False)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    allocate(model, trajectories(), dict.fromkeys(model.gains, GRID), Allocation(inputs=8), RANGES, 0)
    for name, value in model.state_dict().items():
        assert (value.data_ptr(), True) == (before[name][0], torch.equal(value, before[name][1]))
    assert [p.requires_grad for p in (model.a.weight, model.b.weight)] == [True, False]
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_predictions_do_not_depend_on_gets_the_fewest():
    model = Sum({"a": 1.0, "idle": 0.0})
    record = allocate(model, trajectories(), dict.fromkeys(model.gains, GRID), Allocation(inputs=48), RANGES, 0)
    assert record.tensors["bits"].tolist() == [6, 2]


def test_half_precision_models_are_measured_in_their_own_dtype():
    model = Sum({"loud": 30.0, "quiet": 0.1}).bfloat16()
    given = trajectories()
    half = Trajectories(given.samples.bfloat16(), given.timesteps)
    record = allocate(model, half, dict.fromkeys(model.gains, GRID), Allocation(inputs=48), RANGES, 0)
    assert record.tensors["bits"].tolist() == [6, 2]
    assert model.loud.weight.dtype == torch.bfloat16
