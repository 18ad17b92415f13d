"""Sines of patch positions as a part of a graph, for images of any size."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from tcaq.layers.insert import replace

LONGEST = 10_000.0


class PatchPositions(nn.Module):
    """diffusers' `PatchEmbed` whose table of positions is computed from the image at hand.

    diffusers compares the image with the size of its stored table, and computes another table in Python where they differ; a
    trace would keep one of them for good.

    Attributes: rates: float32 [features / 4], of the sines.
    """

    rates: Tensor

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj
        self.base, self.stretch = embed.base_size, embed.interpolation_scale
        quarter = cast(Tensor, embed.pos_embed).shape[-1] // 4
        steps = torch.arange(quarter, dtype=torch.float64) / quarter
        self.register_buffer("rates", (LONGEST**-steps).float())

    def forward(self, latent: Tensor) -> Tensor:
        """Tokens of `latent`, float [batch, channels, height, width]: float [batch, tokens, features]."""
        patches = self.proj(latent)
        # counted, not asked for: a size would be a number of Python, which a trace could freeze
        across, down = self._sines(torch.ones_like(patches[0, 0, 0])), self._sines(torch.ones_like(patches[0, 0, :, 0]))
        blank = torch.zeros_like(patches[0, 0]).unsqueeze(-1)
        positions = torch.cat([across.unsqueeze(0) + blank, down.unsqueeze(1) + blank], dim=-1)
        return cast(Tensor, patches.flatten(2).transpose(1, 2) + positions.flatten(0, 1))

    def _sines(self, ones: Tensor) -> Tensor:
        """Sines and cosines of the positions along an edge, float [patches] of ones -> [patches, features / 2]."""
        along = (ones.cumsum(0) - 1) / (ones.sum() / self.base) / self.stretch
        angles = along.unsqueeze(1) * self.rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def free_positions(denoiser: nn.Module) -> None:
    """Make a denoiser's patch embeddings traceable for images of any size, in place."""
    for name, module in list(denoiser.named_modules()):
        if type(module) is PatchEmbed and _is_plain(module):
            replace(denoiser, name, PatchPositions(module))


def _is_plain(embed: Any) -> bool:
    """Whether an embedding adds sines for any size, and does nothing else; a table that is cropped is traceable as it is."""
    return embed.pos_embed is not None and not embed.pos_embed_max_size and embed.flatten and embed.norm is None
