"""Allocate: a width for each layer's weight by what its rounding does to predictions, within a number of bits for all (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq.models.bypass import common_channels
from tcaq.models.inputs import Inputs
from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.numerics.affine import code_range, fake_quantize
from tcaq.numerics.budget import cheapest
from tcaq.numerics.ranges import search_range
from tcaq.records import Record
from tcaq.spec.grid import AffineGrid
from tcaq.spec.recipe import Allocation, RangeSearch
from tcaq.stages.draw import draw_parts


def allocate(
    denoiser: nn.Module, trajectories: Trajectories, grids: Mapping[str, AffineGrid], spec: Allocation, ranges: RangeSearch,
    seed: int,
) -> Record:  # fmt: skip
    """Record `bits`, int64 [layers], and why: `sensitivity`, float64 [layers, widths], and `sizes`, numbers of weights.

    Sensitivity is the squared error of predictions that rounding this one weight makes, relative at each step to what rounding all
    of them to the plan's width makes there, mean over inputs. Errors of different layers are taken for unrelated: they add up.

    Args: denoiser: before quantizers are inserted; grids: of the weights that take part, by layer; seed: of inputs and signs.
    Raises: NumericalError if predictions or their gradients are not finite.
    """
    drawn = [batch for part in draw_parts(trajectories, spec.inputs, seed) for batch in part.split(spec.batch)]
    weights = [Candidate.of(denoiser, name, grid, spec.bits, ranges) for name, grid in grids.items()]
    sensitivity = sensitivities(denoiser, drawn, weights, spec.bits, starting_errors(denoiser, drawn, weights), seed)
    sizes = torch.tensor([weight.parameter.numel() for weight in weights])
    mean = [weight.grid.bits if spec.mean is None else spec.mean for weight in weights]
    budget = math.floor(sum(weight.parameter.numel() * bits for weight, bits in zip(weights, mean, strict=True)))
    widths = torch.tensor(spec.bits)
    bits = widths[cheapest(sensitivity, sizes, widths, budget)]
    tensors = {"bits": bits, "sensitivity": sensitivity, "sizes": sizes}
    return Record(tensors, {"layers": list(grids), "widths": list(spec.bits)})


@dataclass(frozen=True)
class Candidate:
    """A weight that takes part, with what the search of ranges gives it at each width.

    Attributes: grid: the plan's; rows: scale and zero point of each output channel, float [out, 1], by width.
    """

    parameter: nn.Parameter
    grid: AffineGrid
    rows: Mapping[int, tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        denoiser: nn.Module, name: str, grid: AffineGrid, widths: Sequence[int], ranges: RangeSearch
    ) -> Candidate:  # fmt: skip
        """That of a layer. Args: widths: to choose from, beside the plan's own."""
        parameter = denoiser.get_parameter(f"{name}.weight")
        rows = {}
        for bits in {*widths, grid.bits}:
            scale, zero_point = search_range(
                parameter.detach().flatten(1).float(), bits, signed=grid.signed, symmetric=grid.symmetric,
                power=ranges.power, candidates=ranges.weight_candidates,
            )  # fmt: skip
            rows[bits] = scale.unsqueeze(1), zero_point.unsqueeze(1)
        return Candidate(parameter, grid, rows)

    def rounded(self, bits: int) -> Tensor:
        """The weight on its grid of a width, float32 in its own shape."""
        weight = self.parameter.detach()
        hat = fake_quantize(weight.flatten(1).float(), *self.rows[bits], *code_range(bits, self.grid.signed))
        return hat.reshape(weight.shape)

    def error(self, bits: int) -> Tensor:
        """What rounding to a width adds to the weight."""
        return self.rounded(bits) - self.parameter.detach().float()


@torch.no_grad()
def starting_errors(denoiser: nn.Module, drawn: Sequence[Drawn], weights: Sequence[Candidate]) -> Tensor:
    """Mean squared error of predictions at each call, float64 [calls], where all weights have their plan's width.

    One of a call that none of the inputs is of.
    """
    plain = [predicted(denoiser, part[:]) for part in drawn]
    with all_rounded(weights):
        errors = [predicted(denoiser, part[:]) - before for part, before in zip(drawn, plain, strict=True)]
    calls = torch.cat([part.calls for part in drawn])
    squares = torch.cat([error.double().square().flatten(1).mean(dim=1).cpu() for error in errors])
    count = len(drawn[0].trajectories.timesteps)
    totals = torch.zeros(count, dtype=torch.float64).index_add(0, calls, squares)
    seen = torch.bincount(calls, minlength=count)
    return torch.where(seen > 0, totals / seen, 1.0)


@contextmanager
def all_rounded(weights: Sequence[Candidate]) -> Iterator[None]:
    """Inside the block every weight is on its plan's grid; afterwards it is what it was, bit for bit."""
    kept = [weight.parameter.data for weight in weights]
    try:
        for weight in weights:
            weight.parameter.data = weight.rounded(weight.grid.bits).to(weight.parameter.dtype)
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.parameter.data = data


def sensitivities(
    denoiser: nn.Module, drawn: Sequence[Drawn], weights: Sequence[Candidate], widths: Sequence[int], start: Tensor, seed: int
) -> Tensor:  # fmt: skip
    """What `allocate` records of them, float64 [layers, widths], to first order in the rounding errors.

    A prediction moves by its Jacobian times the weight's error, and the square of that is what `(g error)²` averages to, g being
    random signs of all elements carried backwards (Hutchinson's estimator): one pass serves all layers and widths at once.

    Args: start: squared error that counts as one, [calls].
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(weights), len(widths), dtype=torch.float64)
    with learning([weight.parameter for weight in weights]):
        for part in drawn:
            prediction = predicted(denoiser, part[:])
            signs = torch.randint(0, 2, prediction.shape, generator=generator).double() * 2 - 1
            unit = (start[part.calls] * prediction[0].numel()).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
            probe = (signs / unit.reshape(-1, *[1] * (prediction.dim() - 1))).to(prediction)
            gradients = torch.autograd.grad(
                (prediction * probe).sum(), [w.parameter for w in weights], allow_unused=True, materialize_grads=True
            )
            for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                moved = [(gradient.float() * weight.error(bits)).double().sum().cpu() for bits in widths]
                total[i] += torch.stack(moved).square()
    return total / sum(len(part) for part in drawn)


@contextmanager
def learning(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block these parameters have gradients; afterwards each as it was."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, had in zip(parameters, before, strict=True):
            parameter.requires_grad_(had)


def predicted(denoiser: nn.Module, given: Inputs) -> Tensor:
    """The prediction, float32 [rows, ...], in the channels that it shares with x_t: a learned variance is left out."""
    prediction = given(denoiser)
    axis, channels = common_channels(given.sample, prediction)
    return prediction.narrow(axis, 0, channels).float()
