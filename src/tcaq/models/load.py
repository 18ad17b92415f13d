"""Find the model that a user named: a local diffusers directory or a Hub id."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from tcaq.errors import ModelError, NumericalError


def load_pipeline(model: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Load a pipeline from a local diffusers directory or, by its id, from the Hub.

    Raises: ModelError saying what was looked for and what to do.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelError(f"{model!r} exists but is no diffusers pipeline directory: it has no model_index.json")
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        return cast(DiffusionPipeline, DiffusionPipeline.from_pretrained(model, **options))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        tried = "a local directory" if folder.exists() else "a local directory (there is none) and a Hub id"
        raise ModelError(f"cannot load {model!r}, tried as {tried}: {error}") from error


def weights_hash(module: nn.Module) -> str:
    """Hash of all parameters and buffers, names included; equal for equal weights on any machine.

    Raises: NumericalError naming the first tensor that is not finite.
    """
    digest = sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"the model's weight {name!r} holds NaN or infinity; it cannot be quantized")
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
