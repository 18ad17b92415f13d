"""Scale: search the first scale and zero point of every weight and of every operand in every step group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.device import CPU
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import row_widths
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import RangeSearch
from tcaq.stages.observe import mean_squares
from tcaq.stages.rows import Classes, Rows, own_rows, table_rows


def scale_weights(denoiser: nn.Module, ranges: Record, spec: RangeSearch) -> Record:
    """Record `layer|scale` and `layer|zero_point`, [out channels], of each equalized weight.

    An error in an input channel that is always small costs little: errors are weighted by the channel's mean square.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight):
            weight = layer.equalized_weight().detach()
            energy = mean_squares(ranges, name).to(weight.device) / layer.equalizer.square()
            # channels of a grouped convolution differ between outputs; their energies are not comparable
            groups = getattr(layer, "groups", 1)
            each = (energy if groups == 1 else weight.new_ones(weight.shape[1])).reshape(
                1, -1, *[1] * (weight.dim() - 2)
            )
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


def affine_operands(denoiser: nn.Module) -> Iterator[tuple[str, str, AffineQuantizer, Tensor | None]]:
    """Layer, operand, quantizer and TCR vector (None for products) of every affine operand."""
    for name, layer in quantized_layers(denoiser):
        for operand, quantizer in layer.operands.items():
            if isinstance(quantizer, AffineQuantizer):
                yield name, operand, quantizer, layer.equalizer if isinstance(layer, QuantizedWeight) else None


def scale_inputs(denoiser: nn.Module, ranges: Record, spec: RangeSearch, classes: Classes = own_rows) -> Record:
    """Record `layer|operand|scale` and `|zero_point`, [groups], for affine operands.

    Args: classes: which steps share a row, by layer.
    """
    tensors: dict[str, Tensor] = {}
    for name, operand, quantizer, vector in affine_operands(denoiser):
        key = f"{name}|{operand}"
        rows, widths = operand_rows(quantizer, ranges, classes(name))
        # the search is long: it runs where the model does
        values = grouped_values(ranges, key, rows.positions, vector, quantizer.scale.device)
        scale, zero_point = values.new_ones(len(values)), values.new_zeros(len(values))
        for bits in widths.unique().tolist():
            own = (widths == bits).to(values.device)
            scale[own], zero_point[own] = search_range(
                values[own], bits, signed=quantizer.grid.signed, symmetric=quantizer.grid.symmetric, power=spec.power,
                candidates=spec.input_candidates,
            )  # fmt: skip
        scale, zero_point = scale.cpu(), zero_point.cpu()
        tensors |= {f"{key}|scale": scale[rows.of_group], f"{key}|zero_point": zero_point[rows.of_group]}
    return Record(tensors)


def operand_rows(
    quantizer: AffineQuantizer | ProbabilityQuantizer, ranges: Record, classes: Tensor | None
) -> tuple[Rows, Tensor]:
    """The rows of an operand's table and the width of each, int64 [classes]: a class falls into as many as it has widths.

    Args: classes: of the operand's layer, see Classes.
    """
    boundaries, timesteps, widths = quantizer.clock.boundaries, ranges.tensors["timesteps"], row_widths(quantizer)
    if classes is not None:
        of_step = widths[torch.searchsorted(boundaries, timesteps.to(boundaries.dtype), right=True)]
        classes = classes * (int(widths.max()) + 1) + of_step
    rows = table_rows(boundaries, timesteps, ranges.tensors["shares"], classes)
    found = torch.full((len(rows.positions),), quantizer.grid.bits)
    found[rows.of_group] = widths
    return rows, found


def grouped_values(
    ranges: Record, key: str, positions: Tensor, vector: Tensor | None, device: torch.device = CPU
) -> Tensor:  # fmt: skip
    """What a grid must hold in each class of steps, float [classes, n]: an operand's sample and the extremes, which it may miss.

    Args: positions: see Rows; vector: the TCR vector that the operand is divided by; device: where they are wanted.
    """
    found = [ranges.tensors[f"{key}|{statistic}"][positions].to(device) for statistic in ("rows", "low", "high")]
    rows, low, high = (part if vector is None else part / vector for part in found)
    ends = low.flatten(1).amin(1, keepdim=True), high.flatten(1).amax(1, keepdim=True)
    return torch.cat([rows.flatten(1), *ends], dim=1)


def apply_input_scales(denoiser: nn.Module, record: Record) -> None:
    """Write the tables of every affine operand."""
    for name, operand, quantizer, _ in affine_operands(denoiser):
        key = f"{name}|{operand}"
        quantizer.set_rows(record.tensors[f"{key}|scale"], record.tensors[f"{key}|zero_point"])
