"""Build an integer layer from a quantized one: find a form of its weight that the device multiplies exactly, and pack it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from tcaq.integer.backend import Backend, Geometry, Span
from tcaq.integer.layer import IntegerConv2d, IntegerLayer, IntegerLinear
from tcaq.integer.token import IntegerTokenLinear
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.integers import SignedCodes, signed_codes
from tcaq.quantizers.token import TokenQuantizer


class NoKernel(Exception):
    """No kernel of the device runs the layer exactly; the message says why."""


def integer_layer(layer: QuantizedWeight, backend: Backend) -> IntegerLayer:
    """The layer's stand-in. Raises: NoKernel."""
    if isinstance(layer, QuantizedConv2d):
        return _conv(layer, backend)
    if isinstance(layer, QuantizedLinear):
        return _linear(layer, backend)
    raise NoKernel(f"{type(layer).__name__} has no integer counterpart")


def _conv(layer: QuantizedConv2d, backend: Backend) -> IntegerConv2d:
    geometry, padded = convolution_geometry(layer)

    def problem(shape: tuple[int, ...], span: Span) -> str | None:
        return backend.conv_problem(shape, geometry, span)

    codes = _form(layer, problem)
    weight, scale, bias = stacked(codes, layer)
    return IntegerConv2d(layer, codes, backend.conv(weight, scale, bias, geometry), padded)


def _linear(layer: QuantizedLinear, backend: Backend) -> IntegerLayer:
    codes = _form(layer, backend.linear_problem)
    if isinstance(layer.input_quantizer, TokenQuantizer):
        weight, scale, _ = stacked(codes, layer)
        return IntegerTokenLinear(layer, codes, backend.linear(weight, scale, None))
    return IntegerLinear(layer, codes, backend.linear(*stacked(codes, layer)))


def _form(layer: QuantizedWeight, problem: Callable[[tuple[int, ...], Span], str | None]) -> SignedCodes:
    """The cheapest form of the weight that runs exactly."""
    n = layer.weight_quantizer.centered()
    reasons: list[str] = []
    for form in signed_codes(n):
        shape = (_rows(form, len(n), layer.groups), *n.shape[1:])
        found = problem(shape, Span(*form.extremes, layer.input_quantizer.high - layer.input_quantizer.low))
        if found is None:
            return form
        reasons.append(found)
    raise NoKernel("; ".join(dict.fromkeys(reasons)))


def _rows(form: SignedCodes, out: int, groups: int) -> int:
    return len(form.planes) * out + form.has_rest * groups


def stacked(form: SignedCodes, layer: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Everything one kernel multiplies at once: in each group its planes, then the summing channel.

    Returns: weight int8 [rows, ...], scale float32 [rows], bias float32 [rows] or None.
    """
    scale, bias = layer.weight_quantizer.scale, layer.quantized_bias()
    ones = torch.ones_like(form.planes[0][:1])
    weights, scales, biases = [], [], []
    for group in range(layer.groups):
        for index, (factor, plane) in enumerate(zip(form.factors, form.planes, strict=True)):
            own = slice(*(len(plane) // layer.groups * end for end in (group, group + 1)))
            weights.append(plane[own])
            scales.append(factor * scale[own])
            biases.append(
                bias[own].detach().float() if bias is not None and index == 0 else torch.zeros_like(scale[own])
            )
        if form.has_rest:
            weights.append(ones)
            scales.append(scale.new_ones(1))
            biases.append(scale.new_zeros(1))
    return torch.cat(weights).contiguous(), torch.cat(scales), None if bias is None else torch.cat(biases)


def convolution_geometry(layer: nn.Conv2d) -> tuple[Geometry, list[int]]:
    """How a kernel slides, and what must be padded before it, as `torch.nn.functional.pad` takes it."""
    pair = cast("tuple[int, int]", layer.stride), cast("tuple[int, int]", layer.dilation)
    around = list(layer._reversed_padding_repeated_twice)
    right_left = around[0] != around[1] or around[2] != around[3]
    if layer.padding_mode != "zeros" or right_left:
        return Geometry(pair[0], (0, 0), pair[1], layer.groups), around
    return Geometry(pair[0], (around[2], around[0]), pair[1], layer.groups), [0, 0, 0, 0]
