"""The two matrix products of an attention, as layers of their own: scores = q k^T and mix = p v."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode, Moded
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import affine_quantizer, probability_quantizer
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.grid import AffineGrid, ProbabilityGrid
from tcaq.spec.plan import LayerGrids

OperandQuantizer = AffineQuantizer | ProbabilityQuantizer


def operand_quantizer(grid: AffineGrid | ProbabilityGrid, clock: StepClock) -> OperandQuantizer:
    """The quantizer for a grid."""
    return affine_quantizer(grid, clock) if isinstance(grid, AffineGrid) else probability_quantizer(grid, clock)


class QuantizedProduct(Moded, nn.Module):
    """`left @ right` with both operands quantized per step group.

    Scores: left q [batch, heads, tokens, dim], right k^T [batch, heads, dim, tokens]; mix: left probabilities, right v.
    A product that the plan keeps in float has no quantizers.
    """

    left_quantizer: OperandQuantizer | None
    right_quantizer: AffineQuantizer | None

    def __init__(self, grids: LayerGrids | None, clock: StepClock) -> None:
        super().__init__()
        quantized = grids is not None and not grids.is_float
        self.left_quantizer = (
            operand_quantizer(cast(AffineGrid, cast(LayerGrids, grids).inputs[0]), clock) if quantized else None
        )
        self.right_quantizer = (
            affine_quantizer(cast(AffineGrid, cast(LayerGrids, grids).inputs[1]), clock) if quantized else None
        )

    @property
    def is_float(self) -> bool:
        """Whether the original arithmetic, fused, gives what this gives now; a traced graph would freeze sizes in it."""
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return self.mode is Mode.FLOAT or not (self.operands or tracing)

    @property
    def operands(self) -> dict[str, OperandQuantizer]:
        """The quantizers of this layer's inputs, by operand name."""
        if self.left_quantizer is None or self.right_quantizer is None:
            return {}
        return {"left": self.left_quantizer, "right": self.right_quantizer}

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        """`left @ right * scale`, in the operands' dtype."""
        if self.mode is Mode.FAKE and self.left_quantizer is not None and self.right_quantizer is not None:
            left, right = self.left_quantizer(left), self.right_quantizer(right)
        if left.dtype == torch.float16:  # holds no more than 65504, which products of queries and keys may exceed
            return torch.matmul(left * scale, right)
        product = torch.matmul(left, right)
        return product if scale == 1 else product * scale
