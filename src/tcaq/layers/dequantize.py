"""Turn quantized layers back into plain ones."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from tcaq.layers.attention import MIX, SCORES, ProductProcessor
from tcaq.layers.conv import QuantizedConv2d, conv_options
from tcaq.layers.insert import replace
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.split import SplitConv2d


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo `insert` in place: plain layers that hold the quantized weights' values, and attention as it was.

    Inputs are no longer quantized. Args: dtype: of the plain layers' weights.
    """
    modules = list(model.named_modules())
    split = {name for name, module in modules if isinstance(module, SplitConv2d)}
    for name, module in modules:
        if isinstance(module, SplitConv2d):
            replace(model, name, _plain_split(module, dtype))
        elif isinstance(module, QuantizedConv2d):
            if name.rpartition(".")[0] not in split:
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


def _plain_split(layer: SplitConv2d, dtype: torch.dtype) -> nn.Conv2d:
    whole, rest = _plain_conv(layer.first, dtype), _plain_conv(layer.second, dtype)
    whole.weight = nn.Parameter(torch.cat([whole.weight, rest.weight], dim=1).detach())
    whole.in_channels += rest.in_channels
    return whole


def _plain_linear(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(layer.quantized_weight(dtype).detach())
    bias = layer.quantized_bias()
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return plain.train(layer.training)
