"""What small errors inside a denoiser do to its predictions: random signs carried backwards (Hutchinson's estimator).

A prediction moves by its Jacobian times an error δ, to first order. With random signs v of all of its elements and g = Jᵀ v, the
square of g · δ averages to |J δ|²: one backward pass serves every place in the model and every δ there, however many there are.
The elements are those of the prediction's bands of spatial frequencies, each in its own unit: an error of the whole picture costs
an image thousands of times what fine noise of the same power does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcaq.models.bypass import common_channels
from tcaq.models.inputs import Inputs
from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.numerics.bands import bands
from tcaq.spec.recipe import Allocation
from tcaq.stages.draw import draw_parts


def draw_batches(trajectories: Trajectories, spec: Allocation, seed: int) -> list[Drawn]:
    """`inputs` of the recorded inputs in batches."""
    return [batch for part in draw_parts(trajectories, spec.inputs, seed) for batch in part.split(spec.batch)]


def predicted(denoiser: nn.Module, given: Inputs) -> Tensor:
    """The prediction, float32 [rows, ...], in the channels that it shares with x_t: a learned variance is left out."""
    prediction = given(denoiser)
    axis, channels = common_channels(given.sample, prediction)
    return prediction.narrow(axis, 0, channels).float()


@torch.no_grad()
def predictions(denoiser: nn.Module, drawn: Sequence[Drawn]) -> list[Tensor]:
    """Those of all batches."""
    return [predicted(denoiser, part[:]) for part in drawn]


def errors_by_call(drawn: Sequence[Drawn], before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of predictions at each call in each band, float64 [calls, bands]; 1 of a call that no input is of."""
    calls = torch.cat([part.calls for part in drawn])
    pairs = zip(before, after, strict=True)
    squares = torch.cat([mean_squares((b - a).double()).cpu() for a, b in pairs])
    count = len(drawn[0].trajectories.timesteps)
    totals = torch.zeros(count, squares.shape[1], dtype=torch.float64).index_add(0, calls, squares)
    seen = torch.bincount(calls, minlength=count)[:, None]
    return torch.where(seen > 0, totals / seen, 1.0)


def apart(prediction: Tensor) -> list[Tensor]:
    """The bands of predicted pictures [rows, channels, height, width]; what is no picture has one, all of it."""
    return bands(prediction) if prediction.dim() == 4 else [prediction]


def mean_squares(error: Tensor) -> Tensor:
    """Of each row in each band, [rows, bands]."""
    return torch.stack([band.square().flatten(1).mean(dim=1) for band in apart(error)], dim=1)


def signed(prediction: Tensor, unit: Tensor, generator: torch.Generator) -> Tensor:
    """Jᵀ v is the gradient of this number: |J δ|² is the mean over bands of squared errors in their units, summed over rows.

    Args: unit: the squared error that counts as one, float64 [rows, bands].
    """
    parts = apart(prediction)
    total = prediction.new_zeros(())
    for part, own in zip(parts, unit.unbind(dim=1), strict=True):
        random = torch.randint(0, 2, part.shape, generator=generator).double() * 2 - 1
        size = (own * part[0].numel() * len(parts)).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        total = total + (part * (random / size.reshape(-1, *[1] * (part.dim() - 1))).to(part)).sum()
    return total
