"""What a layer's input goes through right before it is quantized, where that can be done in one with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import silu


@dataclass(frozen=True)
class NormedSilu:
    """`silu(norm(x + added))`.

    Attributes: norm: with weight and bias; added: float [batch, channels], to be added to each pixel first, or None.
    """

    norm: nn.GroupNorm
    added: Tensor | None = None

    def __call__(self, x: Tensor, owned: bool) -> Tensor:
        """Of x, float [batch, channels, height, width], a new tensor; x may be overwritten if it is `owned`."""
        if self.added is not None:
            added = self.added[:, :, None, None]
            x = x.add_(added) if owned else x + added
        return silu(self.norm(x), inplace=True)
