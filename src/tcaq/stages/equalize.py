"""Equalize: choose each layer's TCR vector from its observed ranges."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.equalize import predicted_noise, shared_worth, tcr_vector
from tcaq.quantizers.token import TokenQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import Tcr
from tcaq.stages.observe import channel_ends, channel_maxima, channel_squares

Kind = Literal["conv", "linear"]
STRENGTHS = tuple(step / 8 for step in range(9))
"""Tried for each layer where the recipe leaves the strength to it; the weaker of two equal ones stays."""


def equalize(denoiser: nn.Module, ranges: Record, spec: Tcr, without: nn.Module | None = None) -> Record:
    """Record r for every layer of the kinds that the recipe names, float32 [in channels], by layer name.

    Args: without: a layer that gets none.
    """
    vectors = {}
    kinds = prevailing_kinds(denoiser) if spec.kinds is None else spec.kinds
    for name, layer in quantized_layers(denoiser):
        if not isinstance(layer, QuantizedWeight) or layer is without:
            continue
        # a grouped convolution shares no input channel between groups, so one vector over all inputs does not fit its weight
        if kind_of(layer) in kinds and layer.groups == 1:
            vectors[name] = chosen_vector(name, layer, ranges, spec)
    return Record(vectors)


def kind_of(layer: QuantizedWeight) -> Kind:
    """As recipes name it."""
    return "conv" if isinstance(layer, QuantizedConv2d) else "linear"


def prevailing_kinds(denoiser: nn.Module) -> tuple[Kind, ...]:
    """Convolutions; linear layers as well where they hold most of the weights, as in transformers."""
    held = {"conv": 0, "linear": 0}
    for _, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight):
            held[kind_of(layer)] += layer.float_weight().numel()
    return ("conv", "linear") if held["linear"] > held["conv"] else ("conv",)


def chosen_vector(name: str, layer: QuantizedWeight, ranges: Record, spec: Tcr) -> Tensor:
    """r of one layer, float32 [in channels]."""
    vector = partial(tcr_vector, channel_maxima(ranges, name), percentile=spec.percentile, truncate=spec.truncate)
    asked = spec.strength if kind_of(layer) == "conv" else spec.linear_strength
    if asked != "layer":
        return vector(strength=asked)
    return min((vector(strength=tried) for tried in STRENGTHS), key=partial(layer_noise, name, layer, ranges))


@torch.no_grad()
def layer_noise(name: str, layer: QuantizedWeight, ranges: Record, vector: Tensor) -> float:
    """The noise that rounding is expected to add to a layer's output with a vector."""
    worth, squares = input_worth(name, layer, ranges, vector), channel_squares(ranges, name)
    bits = layer.weight_quantizer.grid.bits
    return predicted_noise(layer.float_weight().cpu(), vector, worth, squares, weight_bits=bits)


def input_worth(name: str, layer: QuantizedWeight, ranges: Record, vector: Tensor) -> Tensor:
    """What a code of a layer's input is worth at each step with a vector, float32 [steps].

    Tokens, each with a grid of its own, count with the root mean square over those that were sampled.
    """
    quantizer = layer.input_quantizer
    if not isinstance(quantizer, TokenQuantizer):
        return shared_worth(*channel_ends(ranges, name), vector, quantizer.grid.bits)
    scale, _ = quantizer.grid_of(ranges.tensors[f"{name}|input|rows"], vector)
    return scale.square().mean(dim=(1, 2)).sqrt()


def apply_vectors(denoiser: nn.Module, record: Record) -> None:
    """Write the vectors into their layers."""
    for name, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight) and name in record.tensors:
            layer.equalizer.copy_(record.tensors[name])
