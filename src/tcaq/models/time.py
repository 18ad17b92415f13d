"""The path of the timestep through a U-Net: its embedding, and what brings the embedding into each block."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.models.architectures import architecture
from tcaq.models.units import Unit

MIXED = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
"""Fields of a U-Net's config that mix the embedding with other conditions."""


class TimePath(nn.Module):
    """From timesteps to everything that depends on them alone: the outputs of all blocks' projections, side by side.

    It shares the denoiser's modules. TFMQ-DM (Huang et al., CVPR 2024) reconstructs them together, because what they put out is a
    function of t, of which sampling only ever sees a finite set.
    """

    def __init__(self, denoiser: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        model = cast(Any, denoiser)
        self.position, self.embedding = model.time_proj, model.time_embedding
        self.projections = nn.ModuleList([cast(Any, block).time_emb_proj for block in blocks])
        self.nonlinearities = [cast(Any, block).nonlinearity for block in blocks]

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps [n] to the projections of their embeddings, float [n, sum of the blocks' channels]."""
        dtype = next(self.embedding.parameters()).dtype
        embedded = self.embedding(self.position(timesteps).to(dtype))
        pairs = zip(self.projections, self.nonlinearities, strict=True)
        return torch.cat([projection(activate(embedded)) for projection, activate in pairs], dim=1)


def time_unit(denoiser: nn.Module) -> Unit:
    """The time path as a unit. Raises: ModelError if the denoiser has none of the kind known here."""
    config = cast(Any, getattr(denoiser, "config", {}))
    if mixed := [name for name in MIXED if config.get(name) is not None]:
        raise ModelError(
            f"{type(denoiser).__name__} adds other embeddings to that of the timestep ({', '.join(mixed)}), so its time path is no "
            "function of the timestep alone; choose a recipe without this unit"
        )
    blocks = [m for m in denoiser.modules() if isinstance(getattr(m, "time_emb_proj", None), nn.Linear)]
    if not blocks or not hasattr(denoiser, "time_embedding"):
        raise ModelError(
            f"{type(denoiser).__name__} has no time embedding with a projection in each block; this recipe needs a U-Net"
        )
    return Unit("time", TimePath(denoiser, blocks))


def is_time_layer(denoiser: nn.Module, name: str) -> bool:
    """Whether a layer's input depends on the timestep alone."""
    row = architecture(denoiser)
    return any(fnmatchcase(name, pattern) for pattern in (*row.time, *row.projections))
