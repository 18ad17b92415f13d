"""A denoiser that another runtime computes, in the place of the one in a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from tcaq.errors import UsageError

Predict = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
"""Noisy batch [batch, in, height, width] and one timestep [1] -> prediction [batch, out, height, width]."""


class ExportedDenoiser(nn.Module):
    """Called like a `UNet2DModel`; a batch with several timesteps is run timestep by timestep.

    Attributes: fingerprint: uint8 [32], SHA-256 of the files' checksums: the only state, so that two models can be told apart.
    """

    fingerprint: Tensor

    def __init__(self, predict: Predict, config: Any, checksums: Mapping[str, str]) -> None:
        super().__init__()
        self._predict, self.config = predict, config
        digest = sha256("".join(checksums[name] for name in sorted(checksums)).encode()).digest()
        self.register_buffer("fingerprint", torch.frombuffer(bytearray(digest), dtype=torch.uint8))

    @property
    def dtype(self) -> torch.dtype:
        """Of its inputs and outputs."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs live."""
        return self.fingerprint.device

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict noise; arguments and result are those of `UNet2DModel`. Raises: UsageError for class labels."""
        if class_labels is not None:
            raise UsageError("an exported denoiser takes no class labels")
        times = torch.as_tensor(timestep).reshape(-1).float().cpu()
        groups = [times] if len(times) == 1 else list(times.unique().split(1))
        result = torch.empty(0)
        for time in groups:
            own = torch.ones(len(sample), dtype=torch.bool) if len(times) == 1 else times == time
            part = torch.from_numpy(self._predict(sample[own].float().cpu().numpy(), time.numpy()))
            if result.numel() == 0:
                result = part.new_empty(len(sample), *part.shape[1:])
            result[own] = part
        result = result.to(sample.device, sample.dtype)
        return UNet2DOutput(sample=result) if return_dict else (result,)
