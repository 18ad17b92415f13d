"""Signal-to-noise ratios of step-aware mixed precision (PTQD, He et al., NeurIPS 2023, section 3.4).

The forward process leaves `SNR_F(t) = alpha_bar_t / (1 - alpha_bar_t)` in x_t; quantization at b bits leaves
`SNR_Q(t) = |eps| / |eps_hat - eps|` in the predicted noise. A step gets the narrowest width with `SNR_Q > SNR_F`. In the paper
SNR_F is a ratio of powers, and SNR_Q one of two-norms, not of their squares.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]


def forward_snr(alpha_bar: Tensor) -> Tensor:
    """SNR_F, float64 in the shape of `alpha_bar`, the part of x_t's power that is signal, below 1."""
    share = alpha_bar.double()
    return share / (1 - share)


def noise_snr(noise: Tensor, error: Tensor, *, squared: bool) -> Tensor:
    """SNR_Q of each step, float64 [steps].

    Args: noise: what the float model predicts, float [steps, images, ...]; error: of the quantized one; squared: powers, not norms.
    """
    signal, rest = (part.double().flatten(1).square().sum(1) for part in (noise, error))
    ratio = signal / rest.clamp(min=torch.finfo(torch.float64).tiny)
    return ratio if squared else ratio.sqrt()


def as_noise(prediction: Tensor, x: Tensor, alpha_bar: Tensor, kind: Prediction) -> Tensor:
    """The noise in x_t that a prediction stands for.

    Args: prediction, x: float [steps, ...]; alpha_bar: float [steps]; kind: the noise, v (Salimans & Ho, 2022), or the image.
    """
    if kind == "epsilon":
        return prediction
    share = alpha_bar.to(prediction.dtype).reshape(-1, *[1] * (prediction.dim() - 1))
    signal, noise = share.sqrt(), (1 - share).sqrt()
    if kind == "v_prediction":
        return signal * prediction + noise * x
    return (x - signal * prediction) / noise


def variance_of_noise(alpha_bar: Tensor, kind: Prediction) -> Tensor:
    """The variance in `as_noise` of a prediction that has variance 1 where x is known; in the shape of `alpha_bar`."""
    if kind == "epsilon":
        return torch.ones_like(alpha_bar)
    return alpha_bar if kind == "v_prediction" else alpha_bar / (1 - alpha_bar)


def narrowest(snr: Tensor, least: Tensor) -> Tensor:
    """Position of the first width whose ratio is above the least one; the last where none is; int64 [steps].

    Args: snr: float [widths, steps], from the narrowest width on; least: float [steps].
    """
    enough = snr > least
    enough[-1] = True
    return enough.int().argmax(dim=0)
