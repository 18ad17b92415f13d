"""A layer's product as one of matrices: what each column of its weight is multiplied with."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad, unfold

from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.weighted import QuantizedWeight


def equalized_input(layer: QuantizedWeight, x: Tensor) -> Tensor:
    """The quantized input in TCR's units, Q(x / r): what W r is multiplied with.

    Args: x: what a convolution or a linear layer is given, float [batch, ...], of the batch that the step clock was set for.
    """
    return layer.quantized_input(x) / layer.gain(x.dim())


def input_columns(layer: QuantizedWeight, x: Tensor) -> Tensor:
    """What each column of the layer's weight, flattened to a matrix, is multiplied with.

    Args: x: float [any batch, ...], the input that the product is made of.
    Returns: float [groups, places, columns], a row for each place of the output (a pixel, a token).
    """
    if not isinstance(layer, QuantizedConv2d):
        return x.reshape(1, -1, x.shape[-1])
    # as the convolution pads, whatever was asked for: a number, "same", or a way of its own to fill
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    windows = unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    columns: Tensor = windows.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return columns
