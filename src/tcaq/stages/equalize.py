"""Equalize: choose each layer's TCR vector from its observed ranges."""

from __future__ import annotations

from torch import nn

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.equalize import tcr_vector
from tcaq.records import Record
from tcaq.spec.recipe import Tcr
from tcaq.stages.observe import channel_maxima


def equalize(denoiser: nn.Module, ranges: Record, spec: Tcr, without: nn.Module | None = None) -> Record:
    """Record r for every layer of the kinds that the recipe names, float32 [in channels], by layer name.

    Args: without: a layer that gets none.
    """
    vectors = {}
    for name, layer in quantized_layers(denoiser):
        kind = "conv" if isinstance(layer, QuantizedConv2d) else "linear"
        # a grouped convolution shares no input channel between groups, so one vector over all inputs does not fit its weight
        whole = isinstance(layer, QuantizedWeight) and getattr(layer, "groups", 1) == 1
        if whole and kind in spec.kinds and layer is not without:
            maxima = channel_maxima(ranges, name)
            vectors[name] = tcr_vector(
                maxima, percentile=spec.percentile, truncate=spec.truncate, strength=spec.strength
            )
    return Record(vectors)


def apply_vectors(denoiser: nn.Module, record: Record) -> None:
    """Write the vectors into their layers."""
    for name, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight) and name in record.tensors:
            layer.equalizer.copy_(record.tensors[name])
