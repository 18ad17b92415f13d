"""What quantized convolutions and linear layers share: a weight, one input, and a TCR vector between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tcaq.errors import CheckpointError
from tcaq.layers.modes import Mode, Moded
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import affine_quantizer
from tcaq.quantizers.token import TokenQuantizer
from tcaq.quantizers.weight import WeightQuantizer
from tcaq.spec.grid import AffineGrid, TokenGrid
from tcaq.spec.plan import LayerGrids


class QuantizedWeight(Moded, nn.Module):
    """Mixin of a quantized `nn.Conv2d` or `nn.Linear`.

    The layer computes `Q(W * r) / r` on `Q(x / r) * r`, which is Q(W r) Q(x / r): the vector r never touches the
    tensors between layers, only the scales. The original weight stays for float mode until `drop_float_weight`.

    Attributes: equalizer: r, float32 [in channels], 1 where TCR is off; bias_correction: None, or float32 [out channels],
        learned in reconstruction and added to the bias in quantized mode only; `drop_float_weight` folds it into the bias;
        held: None, or the quantized weight's values while `holding_weights` keeps them, in the model's dtype.
    """

    CHANNEL_AXIS: int
    groups: int = 1
    equalizer: Tensor
    bias_correction: Tensor | None = None
    held: Tensor | None = None
    input_quantizer: AffineQuantizer | TokenQuantizer
    weight_quantizer: WeightQuantizer

    def _add_quantizers(self, grids: LayerGrids, clock: StepClock) -> None:
        shape = self.float_weight().shape
        self.register_buffer("equalizer", torch.ones(shape[1] * self.groups))
        grid = grids.inputs[0]
        self.input_quantizer = (
            TokenQuantizer(grid) if isinstance(grid, TokenGrid) else affine_quantizer(cast(AffineGrid, grid), clock)
        )
        self.weight_quantizer = WeightQuantizer(cast(AffineGrid, grids.weight), shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take along what is no buffer, for accelerate would offload that; in place what an optimizer owns, as PyTorch does."""
        cast(Any, super())._apply(fn, recurse)
        if self.held is not None:
            self.held = fn(self.held)
        if self.bias_correction is not None and self.bias_correction.requires_grad:
            self.bias_correction.data = fn(self.bias_correction.data)
        elif self.bias_correction is not None:
            self.bias_correction = fn(self.bias_correction)
        return self

    @property
    def operands(self) -> dict[str, AffineQuantizer | TokenQuantizer]:
        """The quantizers of this layer's inputs, by operand name."""
        return {"input": self.input_quantizer}

    def gain(self, dims: int) -> Tensor:
        """r, shaped to broadcast along the channel axis of a tensor with `dims` dimensions."""
        shape = [1] * dims
        shape[self.CHANNEL_AXIS] = -1
        return self.equalizer.reshape(shape)

    def _weight_gain(self, weight: Tensor) -> Tensor:
        """r of the input channels that each output channel sees, [out or 1, in / groups, 1, ...]."""
        gain = self.equalizer.reshape(self.groups, -1)
        if self.groups > 1:
            gain = gain.repeat_interleave(len(weight) // self.groups, dim=0)
        return gain.reshape(*gain.shape, *[1] * (weight.dim() - 2))

    def equalized_weight(self) -> Tensor:
        """W * r, float32: what the weight's codes stand for."""
        weight = self.float_weight().float()
        return weight * self._weight_gain(weight)

    def float_weight(self) -> Tensor:
        """The original weight. Raises: CheckpointError if the layer was loaded from codes and has none."""
        weight = self._parameters["weight"]
        if weight is None:
            raise CheckpointError(
                "this layer holds only packed integer codes; float mode and calibration need the original model: "
                "load that one and quantize it, or run this one as it is"
            )
        return weight

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the name by which adapters (peft) find the device of a layer that has no float weight."""
        return self.weight_quantizer.codes

    def drop_float_weight(self) -> None:
        """Keep only the packed codes; float mode is gone afterwards."""
        if (bias := self.float_bias()) is not None and self.bias_correction is not None:
            bias.data += self.bias_correction.to(bias.dtype)
            self.bias_correction = None
        self.register_parameter("weight", None)

    def quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Q(W r) / r in the layer's own shape."""
        if self.held is not None:
            return self.held.to(dtype)
        learning = self.weight_quantizer.alpha is not None
        hat: Tensor = self.weight_quantizer(self.equalized_weight() if learning else None)
        return (hat / self._weight_gain(hat)).to(dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Q(x / r) * r."""
        return cast(Tensor, self.input_quantizer(x, self.gain(x.dim())))

    def float_bias(self) -> Tensor | None:
        """The layer's bias without correction."""
        return self._parameters["bias"]

    def quantized_bias(self) -> Tensor | None:
        """The bias, with its correction if it has one."""
        bias = self.float_bias()
        return bias if bias is None or self.bias_correction is None else bias + self.bias_correction.to(bias.dtype)

    def learn_bias(self) -> list[Tensor]:
        """Start to learn the correction of the bias; returns what an optimizer must own: nothing where there is no bias."""
        if (bias := self.float_bias()) is None:
            return []
        start = torch.zeros_like(bias, dtype=torch.float32) if self.bias_correction is None else self.bias_correction
        self.bias_correction = start.detach().requires_grad_()
        return [self.bias_correction]

    def end_learning(self) -> None:
        """Keep what was learned of the bias, without its gradient."""
        if self.bias_correction is not None:
            self.bias_correction = self.bias_correction.detach()

    def output_step(self) -> float:
        """What one code of the input is worth in the output, roughly: the scale that a correction of the bias is measured in."""
        weight = self.equalized_weight().detach().flatten(1)
        given = self.input_quantizer
        step = given.usual_step if isinstance(given, TokenQuantizer) else float(given.scale.mean())
        return float(weight.norm(dim=1).mean() * step)

    @property
    def is_float(self) -> bool:
        """Whether a forward pass takes the original arithmetic now."""
        return self.mode is not Mode.FAKE
