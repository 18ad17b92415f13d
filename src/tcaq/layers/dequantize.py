"""Turn quantized layers back into plain ones."""

from __future__ import annotations

import torch
from torch import nn

from tcaq.layers.conv import QuantizedConv2d, conv_options
from tcaq.layers.insert import replace
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.processors import detach_products, has_products
from tcaq.layers.split import SplitConv2d, SplitLinear


def dequantize_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Undo `insert` in place: plain layers that hold the quantized weights' values, and attention as it was.

    Inputs are no longer quantized. Args: dtype: of the plain layers' weights.
    """
    modules = list(model.named_modules())
    split = {name for name, module in modules if isinstance(module, SplitConv2d | SplitLinear)}
    for name, module in modules:
        if isinstance(module, SplitConv2d | SplitLinear):
            replace(model, name, _plain_split(module, dtype))
        elif isinstance(module, QuantizedConv2d | QuantizedLinear):
            if name.rpartition(".")[0] not in split:
                replace(model, name, _plain(module, dtype))
        elif has_products(module):
            detach_products(module)


def _plain(layer: QuantizedConv2d | QuantizedLinear, dtype: torch.dtype) -> nn.Conv2d | nn.Linear:
    plain: nn.Conv2d | nn.Linear
    with torch.device("meta"):
        if isinstance(layer, QuantizedConv2d):
            plain = nn.Conv2d(**conv_options(layer))
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(layer.quantized_weight(dtype).detach())
    bias = layer.quantized_bias()
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return plain.train(layer.training)


def _plain_split(layer: SplitConv2d | SplitLinear, dtype: torch.dtype) -> nn.Conv2d | nn.Linear:
    whole, rest = _plain(layer.first, dtype), _plain(layer.second, dtype)
    whole.weight = nn.Parameter(torch.cat([whole.weight, rest.weight], dim=1).detach())
    if isinstance(whole, nn.Conv2d):
        whole.in_channels = whole.weight.shape[1]
    else:
        whole.in_features = whole.weight.shape[1]
    return whole
