"""What was planted is found and taken out."""

from __future__ import annotations

import torch

from tcaq.numerics.correction import fit_noise, remove_noise, variance_left


def test_planted_slope_bias_and_variance_are_recovered():
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(64, 3, 16, 16, generator=generator) + torch.tensor([0.0, 2.0, -1.0]).reshape(1, 3, 1, 1)
    bias = torch.tensor([0.3, -0.2, 0.05])
    rest = 0.1 * torch.randn(e.shape, generator=generator)
    hat = 1.25 * e + bias.reshape(1, 3, 1, 1) + rest
    found = fit_noise(hat, e)
    torch.testing.assert_close(found.slope.float(), torch.tensor(0.25), atol=2e-3, rtol=0)
    torch.testing.assert_close(found.bias.float(), bias, atol=5e-3, rtol=0)
    torch.testing.assert_close(found.variance.float(), torch.tensor((0.1 / 1.25) ** 2), rtol=2e-2, atol=0)
    left = remove_noise(hat, found.slope, found.bias.reshape(1, 3, 1, 1)) - e
    assert abs(float(left.mean())) < 1e-3
    torch.testing.assert_close(left.square().mean(), found.variance, rtol=1e-6, atol=0)


def test_exact_predictions_need_no_correction():
    e = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    found = fit_noise(e.clone(), e)
    assert float(found.slope) == 0
    assert found.bias.tolist() == [0, 0]
    assert float(found.variance) == 0


def test_least_squares_agree_with_a_solver():
    generator = torch.Generator().manual_seed(2)
    e, hat = (torch.randn(5, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    columns = [e.flatten()] + [torch.zeros_like(e).index_fill_(1, torch.tensor([c]), 1.0).flatten() for c in range(2)]
    solution = torch.linalg.lstsq(torch.stack(columns, 1), (hat - e).flatten()[:, None]).solution.flatten()
    found = fit_noise(hat, e)
    torch.testing.assert_close(torch.cat([found.slope.reshape(1), found.bias]), solution)


def test_a_sampler_never_adds_less_than_nothing():
    assert float(variance_left(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(2.0))) == 0.5
    assert float(variance_left(torch.tensor(0.1), torch.tensor(1.0), torch.tensor(2.0))) == 0.0
