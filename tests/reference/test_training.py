"""The training loop of `tools/`: an interrupted training ends where an undisturbed one does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("tools_training", TOOLS / "training.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Interruption(Exception):
    pass


def fit(training, checkpoint: Path, stop: int = -1) -> tuple[nn.Module, dict]:
    """A line through points of y = 2 x + 1; stops before batch number `stop`."""
    torch.manual_seed(0)
    model, drawn = nn.Linear(1, 1), []

    def loss_of(draw):
        if len(drawn) == stop:
            raise Interruption
        x = torch.rand(8, 1, generator=draw)
        drawn.append(x)
        return (model(x) - (2 * x + 1)).square().mean()

    how = training.Training([300], rate=0.1, ema=0.9, save_every=20)
    return model, training.train(model, loss_of, how, checkpoint)


def test_it_learns_and_keeps_the_curve(training, tmp_path):
    model, record = fit(training, tmp_path / "a.pt")
    assert model.weight.item() == pytest.approx(2, abs=0.05)
    assert model.bias.item() == pytest.approx(1, abs=0.05)
    losses = [loss for _, loss in record["curve"]]
    assert [done for done, _ in record["curve"]] == list(range(20, 301, 20))
    assert losses[-1] < 1e-3 < losses[0]


def test_interrupted_it_ends_where_it_would_have(training, tmp_path):
    whole, record = fit(training, tmp_path / "whole.pt")
    with pytest.raises(Interruption):
        fit(training, tmp_path / "broken.pt", stop=130)
    again, resumed = fit(training, tmp_path / "broken.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert resumed["curve"] == record["curve"]


def test_the_rate_ends_at_zero_in_every_cycle(training):
    rates = [training.rate_at(i, [1000, 500]) for i in range(1500)]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[1000] == pytest.approx(1 / 200)
    assert rates[999] < 0.002
    assert rates[1499] < 0.01
    assert 0.9 < max(rates) <= 1


def test_a_batch_sees_all_noise_levels(training):
    steps = training.spread_timesteps(10, torch.Generator().manual_seed(0))
    assert (steps // 100).tolist() == list(range(10))
