"""A weight in columns with a zero point each, as ONNX's integer products take it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.export.planes import form_within, most_exact
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.integers import BYTE

MIDDLE = 128


class Columns(nn.Module):
    """A weight, whose integers are `weight - zero`.

    They are signed where products of the codes that they meet are added exactly: ONNX Runtime takes less than half the time of
    unsigned ones, but on processors without VNNI it clips sums of two products to 16 bits. Unsigned ones are exact everywhere.

    Attributes: weight: int8 or uint8 [window * in, out]; zero: [out]; gain: float32 [out].
    """

    weight: Tensor
    zero: Tensor
    gain: Tensor

    def __init__(self, layer: QuantizedWeight, top: int, vnni: bool) -> None:
        super().__init__()
        n = layer.weight_quantizer.centered()
        form = form_within(n, -BYTE[0] if vnni else most_exact(top))
        signed = len(form.planes) == 1
        form = form if signed else form_within(n, -BYTE[0])
        kind, offset = (torch.int8, 0) if signed else (torch.uint8, MIDDLE)
        rows = form.planes[0].movedim(1, -1).flatten(1).to(torch.int16)  # channels last, as windows are gathered
        self.register_buffer("weight", (rows + offset).to(kind).t().contiguous())
        self.register_buffer("zero", (offset - form.rest).to(kind))
        self.register_buffer("gain", layer.weight_quantizer.scale.clone())
