"""Allocate: a width for each layer's weight by what its rounding does to predictions, within a number of bits for all (ours)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.numerics.affine import code_range, fake_quantize
from tcaq.numerics.budget import cheapest
from tcaq.numerics.ranges import search_range
from tcaq.records import Record
from tcaq.spec.grid import AffineGrid
from tcaq.spec.recipe import Allocation, RangeSearch
from tcaq.stages.sensitivity import draw_batches, errors_by_call, predicted, predictions, signed


def allocate(
    denoiser: nn.Module, trajectories: Trajectories, grids: Mapping[str, AffineGrid], spec: Allocation, ranges: RangeSearch,
    seed: int,
) -> Record:  # fmt: skip
    """Record `bits`, int64 [layers], and why: `sensitivity`, float64 [layers, widths], and `sizes`, numbers of weights.

    Sensitivity is the squared error of predictions that rounding this one weight makes, relative at each step and in each band of
    spatial frequencies to what rounding all of them to the plan's width makes there, mean over bands and inputs. Errors of
    different layers are taken for unrelated: they add up.

    Args: denoiser: before quantizers are inserted; grids: of the weights that take part, by layer; seed: of inputs and signs.
    Raises: NumericalError if predictions or their gradients are not finite.
    """
    drawn = draw_batches(trajectories, spec, seed)
    weights = [Candidate.of(denoiser, name, grid, spec.bits, ranges) for name, grid in grids.items()]
    sensitivity = sensitivities(denoiser, drawn, weights, spec.bits, starting_errors(denoiser, drawn, weights), seed)
    sizes = torch.tensor([weight.parameter.numel() for weight in weights])
    plain = [weight.grid.bits for weight in weights]
    return chosen(list(grids), sensitivity, sizes, plain, spec)


def chosen(names: list[str], sensitivity: Tensor, sizes: Tensor, plain: Sequence[int], spec: Allocation) -> Record:
    """The record of the best choice. Args: sizes: what a bit of each costs, int64; plain: the plan's own bits."""
    mean = torch.tensor([bits if spec.mean is None else spec.mean for bits in plain], dtype=torch.float64)
    widths = torch.tensor(spec.bits)
    bits = widths[cheapest(sensitivity, sizes, widths, math.floor((mean * sizes).sum()))]
    return Record(
        {"bits": bits, "sensitivity": sensitivity, "sizes": sizes}, {"layers": names, "widths": list(spec.bits)}
    )


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


def starting_errors(denoiser: nn.Module, drawn: Sequence[Drawn], weights: Sequence[Candidate]) -> Tensor:
    """Mean squared error of predictions at each call by band, float64 [calls, bands], all weights at their plan's width."""
    plain = predictions(denoiser, drawn)
    with all_rounded(weights):
        return errors_by_call(drawn, plain, predictions(denoiser, drawn))


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

    Args: start: squared error that counts as one, [calls, bands].
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(weights), len(widths), dtype=torch.float64)
    with requiring([weight.parameter for weight in weights], grad=True):
        for part in drawn:
            carried = signed(predicted(denoiser, part[:]), start[part.calls], generator)
            gradients = torch.autograd.grad(
                carried, [w.parameter for w in weights], allow_unused=True, materialize_grads=True
            )
            for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                moved = [(gradient.float() * weight.error(bits)).double().sum().cpu() for bits in widths]
                total[i] += torch.stack(moved).square()
    return total / sum(len(part) for part in drawn)


@contextmanager
def requiring(parameters: Sequence[nn.Parameter], *, grad: bool) -> Iterator[None]:
    """Inside the block gradients are on, and these parameters have some, or none; afterwards each as it was."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(grad)
        with torch.enable_grad():
            yield
    finally:
        for parameter, had in zip(parameters, before, strict=True):
            parameter.requires_grad_(had)
