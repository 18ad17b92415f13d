"""Build an integer layer from a quantized one: find a form of its weight that the device multiplies exactly, and pack it."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from tcaq.integer.backend import Backend, Geometry, Span, Weights
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

    codes = _form(layer, problem, backend)
    kernel = backend.conv(stacked(codes, layer, backend.adds_rest), geometry)
    return IntegerConv2d(layer, codes, kernel, backend.adds_rest, padded)


def _linear(layer: QuantizedLinear, backend: Backend) -> IntegerLayer:
    codes = _form(layer, backend.linear_problem, backend)
    kind = IntegerTokenLinear if isinstance(layer.input_quantizer, TokenQuantizer) else IntegerLinear
    return kind(layer, codes, backend.linear(stacked(codes, layer, backend.adds_rest)), backend.adds_rest)


def _form(
    layer: QuantizedWeight, problem: Callable[[tuple[int, ...], Span], str | None], backend: Backend
) -> SignedCodes:
    """The cheapest form of the weight that runs exactly."""
    n = layer.weight_quantizer.centered()
    reasons: list[str] = []
    for form in signed_codes(n):
        summing = form.has_rest and not backend.adds_rest
        shape = (len(form.planes) * len(n) + summing * layer.groups, *n.shape[1:])
        found = problem(shape, Span(*form.extremes, layer.input_quantizer.high - layer.input_quantizer.low))
        if found is None:
            return form
        reasons.append(found)
    raise NoKernel("; ".join(dict.fromkeys(reasons)))


def stacked(form: SignedCodes, layer: QuantizedWeight, adds_rest: bool) -> Weights:
    """In each group its planes, then the channel that sums its inputs, unless the kernel adds the rest."""
    scale, bias = layer.weight_quantizer.scale, layer.quantized_bias()
    ones = torch.ones_like(form.planes[0][:1])
    weights, scales, biases, rests = [], [], [], []
    for group in range(layer.groups):
        for index, (factor, plane) in enumerate(zip(form.factors, form.planes, strict=True)):
            own = slice(*(len(plane) // layer.groups * end for end in (group, group + 1)))
            weights.append(plane[own])
            scales.append(factor * scale[own])
            biases.append(
                bias[own].detach().float() if bias is not None and index == 0 else torch.zeros_like(scale[own])
            )
            rests.append(form.rest[own].int() * (factor == 1))  # which is one plane of each form
        if form.has_rest and not adds_rest:
            weights.append(ones)
            scales.append(scale.new_ones(1))
            biases.append(scale.new_zeros(1))
    return Weights(
        torch.cat(weights).contiguous(),
        torch.cat(scales),
        None if bias is None else torch.cat(biases),
        torch.cat(rests) if form.has_rest and adds_rest else None,
    )


def convolution_geometry(layer: nn.Conv2d) -> tuple[Geometry, list[int]]:
    """How a kernel slides, and what must be padded before it, as `torch.nn.functional.pad` takes it."""
    pair = cast("tuple[int, int]", layer.stride), cast("tuple[int, int]", layer.dilation)
    around = list(layer._reversed_padding_repeated_twice)
    right_left = around[0] != around[1] or around[2] != around[3]
    if layer.padding_mode != "zeros" or right_left:
        return Geometry(pair[0], (0, 0), pair[1], layer.groups), around
    return Geometry(pair[0], (around[2], around[0]), pair[1], layer.groups), [0, 0, 0, 0]
