"""Turn quantized layers back into plain ones."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from tcaq.layers.attention import MIX, SCORES, ProductProcessor
from tcaq.layers.conv import QuantizedConv2d, conv_options
from tcaq.layers.insert import replace
from tcaq.layers.linear import QuantizedLinear


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo `insert` in place: plain layers that hold the quantized weights' values, and attention as it was.

    Inputs are no longer quantized. Args: dtype: of the plain layers' weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedConv2d):
            replace(model, name, _plain_conv(module, dtype))
        elif isinstance(module, QuantizedLinear):
            replace(model, name, _plain_linear(module, dtype))
        elif isinstance(module, Attention) and isinstance(module.processor, ProductProcessor):
            delattr(module, SCORES)
            delattr(module, MIX)
            module.set_processor(module.processor.original)


def _plain_conv(layer: QuantizedConv2d, dtype: torch.dtype) -> nn.Conv2d:
    with torch.device("meta"):
        plain = nn.Conv2d(**conv_options(layer))
    plain.weight = nn.Parameter(layer.quantized_weight(dtype).detach())
    bias = layer.quantized_bias()
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return plain.train(layer.training)


def _plain_linear(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(layer.quantized_weight(dtype).detach())
    bias = layer.quantized_bias()
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return plain.train(layer.training)
