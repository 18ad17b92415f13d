"""The correction takes out exactly what was planted, whichever axis holds the channels."""

from __future__ import annotations

import pytest
import torch

from tcaq.layers.modes import Mode, running
from tcaq.models.correction import NoiseCorrection, channels_second
from tcaq.numerics.correction import fit_noise
from tcaq.quantizers.clock import StepClock
from tcaq.spec.steps import StepGroups


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 16, 5)], ids=["image", "tokens"])
def test_channels_beside_the_noise_are_left_alone(shape):
    correction = NoiseCorrection(StepClock(StepGroups()), 3)
    correction.set_rows(torch.tensor([0.5]), torch.ones(1, 3))
    prediction = torch.randn(shape)
    before, after = (channels_second(eps) for eps in (prediction, correction(prediction)))
    torch.testing.assert_close(after[:, :3], (before[:, :3] - 1) / 1.5)
    assert torch.equal(after[:, 3:], before[:, 3:])


@pytest.mark.parametrize("shape", [(4, 3, 6, 5), (4, 30, 3)], ids=["image", "tokens"])
def test_a_planted_slope_and_bias_are_found_and_removed(shape):
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(shape, generator=generator)
    bias = torch.tensor([0.3, -0.2, 0.1])
    planted = 0.9 * eps + (bias if len(shape) == 3 else bias.reshape(3, 1, 1))
    fit = fit_noise(channels_second(planted), channels_second(eps))
    assert float(fit.slope) == pytest.approx(-0.1, abs=1e-5)
    torch.testing.assert_close(fit.bias.float(), bias, rtol=1e-4, atol=1e-5)
    clock = StepClock(StepGroups(boundaries=(500.0,)))
    correction = NoiseCorrection(clock, 3)
    correction.set_rows(torch.tensor([-0.1, 0.0]), torch.stack([bias, torch.zeros(3)]))
    clock.set(torch.tensor([100, 900, 100, 900]))  # the second row changes nothing
    actual = correction(planted)
    torch.testing.assert_close(actual[::2], eps[::2], rtol=1e-4, atol=1e-5)
    assert torch.equal(actual[1::2], planted[1::2])
    with running(correction, Mode.FLOAT):
        assert torch.equal(correction(planted), planted)
