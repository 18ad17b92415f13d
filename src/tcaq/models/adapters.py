"""LoRA adapters on a quantized denoiser: they run beside its layers, and cannot be fused into integer codes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from tcaq.errors import ModelError, UsageError

WRAPPED = "base_layer"
"""Under which name peft's adapters keep the layer that they stand in for."""


def check_plain(denoiser: nn.Module) -> None:
    """Raises: ModelError if adapters are loaded: a plan would name their layers, which nobody has who loads the checkpoint."""
    if any(hasattr(module, WRAPPED) for module in denoiser.modules()):
        raise ModelError(
            f"the {type(denoiser).__name__} has adapters (LoRA), which are no part of a checkpoint: pipe.fuse_lora() to quantize "
            "with them, and pipe.unload_lora_weights() in any case"
        )


def check_unloaded(names: Iterable[str]) -> None:
    """Raises: UsageError if a tensor belongs to an adapter, or to the layer inside it: nobody could load them."""
    if any(f".{WRAPPED}." in name for name in names):
        raise UsageError(
            "adapters (LoRA) are loaded, which are no part of a checkpoint: pipe.unload_lora_weights() before it is saved"
        )


def refuse_fusing(denoiser: nn.Module) -> None:
    """Let `fuse_lora` say why it cannot be, before it touches a layer."""
    denoiser.fuse_lora = _refuse  # type: ignore[assignment]


def allow_fusing(denoiser: nn.Module) -> None:
    """Give a denoiser that is plain again its own method back."""
    vars(denoiser).pop("fuse_lora", None)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "a LoRA adapter cannot be fused into a quantized denoiser: its weights are integer codes. Leave the adapter loaded, which "
        "gives the same images, or fuse it into the original model and quantize that"
    )
