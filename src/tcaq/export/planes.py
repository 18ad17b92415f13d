"""A weight as signed bytes in planes, for a format whose products take no zero points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.integers import SignedCodes, signed_codes


class Planes(nn.Module):
    """See `numerics/integers.py`.

    Attributes: weight: int8 [rows, ...], a row for each plane of each output channel, then one of ones if some need the sum of
        their inputs; gain: float32 [rows], what a row's sums are worth; rest: None, or float32 [out], what the sum of the inputs is
        worth.
    """

    weight: Tensor
    gain: Tensor
    rest: Tensor | None

    def __init__(self, layer: QuantizedWeight, most: int) -> None:
        """Args: most: no number is larger, if there is such a form."""
        super().__init__()
        scale, form = layer.weight_quantizer.scale, form_within(layer.weight_quantizer.centered(), most)
        summing = [torch.ones_like(form.planes[0][:1])] if form.has_rest else []
        self.out, self.planes = len(scale), len(form.planes)
        self.register_buffer("weight", torch.cat([*form.planes, *summing]))
        self.register_buffer(
            "gain", torch.cat([*(factor * scale for factor in form.factors), scale.new_ones(len(summing))])
        )
        self.register_buffer("rest", form.rest * scale if form.has_rest else None)

    def total(self, products: Tensor, axis: int) -> Tensor:
        """Add up the planes, and what `rest` makes of the summing channel."""
        shape = [1] * products.dim()
        shape[axis] = -1
        total = products.narrow(axis, 0, self.out) if len(self.weight) > self.out else products
        for plane in range(1, self.planes):
            total = total + products.narrow(axis, plane * self.out, self.out)
        if self.rest is not None:
            total = total + products.narrow(axis, self.planes * self.out, 1) * self.rest.reshape(shape)
        return total


def form_within(n: Tensor, most: int) -> SignedCodes:
    """The first form of whole numbers without one beyond `most`; the last form if there is none."""
    forms = list(signed_codes(n))
    return next((form for form in forms if max(map(abs, form.extremes)) <= most), forms[-1])


def most_exact(top: int) -> int:
    """The largest weight whose products with codes up to `top` any processor adds in pairs within 16 bits."""
    return 2**15 // (2 * top + 1)
