"""Scale: search the first scale and zero point of every weight and of every operand in every step group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tcaq.layers.insert import channel_axis, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import clock_of
from tcaq.models.sampler import Trajectories
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import RangeSearch
from tcaq.stages.observe import mean_squares
from tcaq.stages.operands import Reservoir, Visitor, as_rows, steps_by_group, visiting


def scale_weights(denoiser: nn.Module, ranges: Record, spec: RangeSearch) -> Record:
    """Record `layer|scale` and `layer|zero_point`, [out channels], of each equalized weight.

    An error in an input channel that is always small costs little: errors are weighted by the channel's mean square.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight):
            weight = layer.equalized_weight().detach()
            energy = mean_squares(ranges, name) / layer.equalizer.square()
            # channels of a grouped convolution differ between outputs; their energies are not comparable
            groups = getattr(layer, "groups", 1)
            each = (energy if groups == 1 else torch.ones(weight.shape[1])).reshape(1, -1, *[1] * (weight.dim() - 2))
            grid = layer.weight_quantizer.grid
            tensors[f"{name}|scale"], tensors[f"{name}|zero_point"] = search_range(
                weight.flatten(1), grid.bits, signed=grid.signed, symmetric=grid.symmetric, power=spec.power,
                candidates=spec.weight_candidates, weights=each.expand_as(weight).flatten(1)[:1],
            )  # fmt: skip
    return Record(tensors)


def apply_weight_scales(denoiser: nn.Module, record: Record) -> None:
    """Write the scales and round every weight to the nearest code."""
    for name, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight):
            scale, zero_point = record.tensors[f"{name}|scale"], record.tensors[f"{name}|zero_point"]
            layer.weight_quantizer.set_rows(scale, zero_point, layer.equalized_weight().detach())


def affine_operands(denoiser: nn.Module) -> Iterator[tuple[str, str, AffineQuantizer, Tensor | None, int]]:
    """Layer name, operand name, quantizer, TCR vector (None for products) and channel axis of every affine operand."""
    for name, layer in quantized_layers(denoiser):
        for operand, quantizer in layer.operands.items():
            if isinstance(quantizer, AffineQuantizer):
                vector = layer.equalizer if isinstance(layer, QuantizedWeight) else None
                yield name, operand, quantizer, vector, channel_axis(layer)


def scale_inputs(denoiser: nn.Module, trajectories: Trajectories, spec: RangeSearch, seed: int) -> Record:
    """Record `layer|operand|scale` and `|zero_point`, [groups]; a group that no calibration step fell into has its neighbour's."""
    targets = {(n, o): (q, r, axis) for n, o, q, r, axis in affine_operands(denoiser)}
    steps = steps_by_group(clock_of(denoiser).boundaries, trajectories)
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {key: [] for key in targets}
    for group, positions in steps.items():
        reservoir = Reservoir(spec.values, len(positions), seed + group)
        limits: dict[tuple[str, str], list[Tensor]] = {}
        visit = _watch(targets, reservoir, limits)
        with visiting(denoiser, visit):
            for position in positions:
                denoiser(trajectories.samples[position], trajectories.timesteps[position])
        for key, rows in reservoir.drain().items():
            grid = targets[key][0].grid
            # the sample may miss the extremes; the search must start from the true range
            values = torch.cat([rows.flatten(), *limits[key]])[None]
            found[key].append(
                search_range(
                    values, grid.bits, signed=grid.signed, symmetric=grid.symmetric, power=spec.power,
                    candidates=spec.input_candidates,
                )
            )  # fmt: skip
    nearest = nearest_group(list(steps), clock_of(denoiser).count)
    tensors: dict[str, Tensor] = {}
    for (name, operand), rows_of in found.items():
        scale, zero_point = (torch.cat(column) for column in zip(*rows_of, strict=True))
        tensors[f"{name}|{operand}|scale"] = scale[nearest]
        tensors[f"{name}|{operand}|zero_point"] = zero_point[nearest]
    return Record(tensors)


def _watch(
    targets: Mapping[tuple[str, str], tuple[AffineQuantizer, Tensor | None, int]],
    reservoir: Reservoir,
    limits: dict[tuple[str, str], list[Tensor]],
) -> Visitor:
    """A visitor that keeps a sample of each operand, divided by its TCR vector, and its extremes."""

    def visit(name: str, operand: str, value: Tensor) -> None:
        if (target := targets.get((name, operand))) is not None:
            _, vector, axis = target
            rows = as_rows(value, axis) if vector is None else as_rows(value, axis) / vector
            reservoir.add(name, operand, rows)
            limits.setdefault((name, operand), []).append(torch.stack(torch.aminmax(rows)).float())

    return visit


def apply_input_scales(denoiser: nn.Module, record: Record) -> None:
    """Write the tables of every affine operand."""
    for name, operand, quantizer, _, _ in affine_operands(denoiser):
        key = f"{name}|{operand}"
        quantizer.set_rows(record.tensors[f"{key}|scale"], record.tensors[f"{key}|zero_point"])


def nearest_group(seen: list[int], count: int) -> Tensor:
    """For each of `count` groups the position in `seen` of the nearest group that was seen."""
    distance = (torch.arange(count)[:, None] - torch.tensor(seen)[None]).abs()
    return distance.argmin(dim=1)
