"""Quantization noise in a predicted noise: the part that follows the prediction, a bias, and what remains (PTQD, He et al. 2023).

`e_hat - e = k e + b_c + n`, with one slope k, a bias b_c for each channel c, and noise n of mean zero. Knowing k and b,
`(e_hat - b_c) / (1 + k)` is left with the noise `n / (1 + k)` alone (section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseModel:
    """What a fit found, float64.

    Attributes: slope: k, []; bias: b, [channels]; variance: of the noise that is left after `remove_noise`, [].
    """

    slope: Tensor
    bias: Tensor
    variance: Tensor


def fit_noise(quantized: Tensor, original: Tensor) -> NoiseModel:
    """Least squares over all elements of predictions on the same inputs, float [n, channels, ...] each."""
    e = original.double().flatten(2).movedim(1, 0).flatten(1)
    difference = quantized.double().flatten(2).movedim(1, 0).flatten(1) - e
    around = e - e.mean(1, keepdim=True)
    slope = (around * difference).sum() / around.square().sum().clamp(min=1e-30)
    bias = difference.mean(1) - slope * e.mean(1)
    rest = difference - slope * e - bias[:, None]
    return NoiseModel(slope, bias, rest.square().mean() / (1 + slope).square())


def remove_noise(eps: Tensor, slope: Tensor, bias: Tensor) -> Tensor:
    """The prediction without the part that is known; slope and bias broadcast against eps."""
    return (eps - bias) / (1 + slope)


def variance_left(variance: Tensor, gain: Tensor, noise: Tensor) -> Tensor:
    """The variance a sampler should still add where a prediction that enters with weight `gain` brings `noise` along; at least 0.

    Section 3.3: the sum of both has the variance that the sampler intended.
    """
    return torch.clamp(variance - gain.square() * noise, min=0.0)
