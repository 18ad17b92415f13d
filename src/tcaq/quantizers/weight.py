"""The quantizer of weights: packed codes, a scale and zero point per output channel, and AdaRound while learning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.errors import NumericalError
from tcaq.numerics.affine import code_range, dequantize, quantize
from tcaq.numerics.packing import pack, packed_length, unpack
from tcaq.numerics.rounding import hard_codes, initial_alpha, rounding_penalty, soft_round
from tcaq.spec.grid import AffineGrid


class WeightQuantizer(nn.Module):
    """Holds a weight as packed codes.

    Attributes: codes: uint8 [ceil(numel * bits / 8)]; scale: float32 [out]; zero_point: int16 [out];
        alpha: None, or AdaRound's variable in the weight's shape while rounding is learned; log_gain: None, or float32 [out] while
        step sizes are learned and the codes stay: the scale in use is `scale * exp(log_gain)`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: AffineGrid, shape: torch.Size) -> None:
        super().__init__()
        self.grid = grid
        self.shape = shape
        self.low, self.high = code_range(grid.bits, grid.signed)
        self.alpha: nn.Parameter | None = None
        self.log_gain: nn.Parameter | None = None
        self.register_buffer("codes", torch.zeros(packed_length(shape.numel(), grid.bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(shape[0]))
        self.register_buffer("zero_point", torch.zeros(shape[0], dtype=torch.int16))

    def _rows(self, table: Tensor) -> Tensor:
        return table.reshape(-1, *[1] * (len(self.shape) - 1)).to(self.scale.dtype)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The quantized-dequantized weight, float32; `weight`, the real one, is needed only while learning."""
        scale, zero_point = self._rows(self.scale), self._rows(self.zero_point)
        if self.alpha is not None and weight is not None:
            return soft_round(weight, self.alpha, scale, zero_point, self.low, self.high)
        if self.log_gain is not None:
            scale = scale * self._rows(self.log_gain.exp())
        return dequantize(self.integers().to(scale.dtype), scale, zero_point)

    def integers(self) -> Tensor:
        """The codes in the weight's shape, int16, within the grid's code range."""
        return unpack(self.codes, self.grid.bits, self.shape).to(torch.int16) + self.low

    def centered(self) -> Tensor:
        """The codes with their row's zero point taken off, int16 in the weight's shape: times `scale`, the weight."""
        return self.integers() - self.zero_point.reshape(-1, *[1] * (len(self.shape) - 1))

    def _store(self, codes: Tensor) -> None:
        if not bool(((codes >= self.low) & (codes <= self.high)).all()):  # NaN is neither
            raise NumericalError(
                f"a weight at {self.grid.bits} bits has codes from {self.low} to {self.high}; a number outside, or NaN, was given"
            )
        self.codes.copy_(pack((codes - self.low).to(torch.uint8), self.grid.bits))

    def set_rows(self, scale: Tensor, zero_point: Tensor, weight: Tensor) -> None:
        """Write scale and zero point, float [out] each, and round `weight` to the nearest code."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        rows, zeros = self._rows(self.scale), self._rows(self.zero_point)
        self._store(quantize(weight.float(), rows, zeros, self.low, self.high))

    def set_integers(self, codes: Tensor) -> None:
        """Write codes that were found by other means than rounding to nearest: whole numbers in the weight's shape.

        Raises: NumericalError if one does not fit the grid.
        """
        self._store(codes)

    def begin_learning(self, weight: Tensor, trust: float) -> list[nn.Parameter]:
        """Start AdaRound between `weight` itself (trust 0) and the roundings that the codes already hold (trust 1).

        AdaRound knows two codes for a weight, its neighbours. A code beyond them (GPTQ's) counts as the neighbour on its side.
        """
        rows, zeros = self._rows(self.scale), self._rows(self.zero_point)
        up = self.integers() - zeros > torch.floor(weight.float() / rows)
        self.alpha = nn.Parameter(initial_alpha(weight.float(), rows, up, trust))
        return [self.alpha]

    def begin_scaling(self) -> list[nn.Parameter]:
        """Start to learn the step sizes under codes that stay; returns what an optimizer must own."""
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))
        return [self.log_gain]

    def penalty(self, beta: float | Tensor) -> Tensor:
        """AdaRound's pull towards decided roundings; zero when rounding is not being learned."""
        return self.scale.new_zeros(()) if self.alpha is None else rounding_penalty(self.alpha, beta)

    def end_learning(self, weight: Tensor) -> None:
        """Decide every rounding and store the codes; fold learned step sizes into `scale`."""
        if self.log_gain is not None:
            self.scale.mul_(self.log_gain.detach().exp())
            self.log_gain = None
        if self.alpha is not None:
            rows, zeros = self._rows(self.scale), self._rows(self.zero_point)
            self._store(hard_codes(weight.float(), self.alpha.detach() >= 0, rows, zeros, self.low, self.high))
            self.alpha = None
