"""LoRA adapters on a quantized denoiser: they run beside its layers, and cannot be fused into integer codes."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from tcaq.errors import UsageError


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
