"""Which attention of diffusers runs as two products, by the class of its processor."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from tcaq.errors import UsageError
from tcaq.layers.attention import MIX, SCORES, ProductProcessor
from tcaq.layers.joint import JointProductProcessor
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.rotary import RotaryProductProcessor
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids

PROCESSORS: dict[str, type[ProductProcessor]] = {
    "AttnProcessor": ProductProcessor,
    "AttnProcessor2_0": ProductProcessor,
    "JointAttnProcessor2_0": JointProductProcessor,
    "FluxAttnProcessor": RotaryProductProcessor,
}


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one of diffusers' attentions, all of which leave their arithmetic to a processor."""
    return hasattr(module, "processor") and hasattr(module, "set_processor")


def has_products(attention: nn.Module) -> bool:
    """Whether an attention runs as two products already."""
    return isinstance(getattr(attention, "processor", None), ProductProcessor)


def why_float(attention: nn.Module) -> str | None:
    """Why the products of an attention cannot be quantized; None if they can."""
    if has_products(attention):
        return None
    name = type(attention.processor).__name__
    if name not in PROCESSORS:
        return f"its processor {name} is not known here: docs/add-an-architecture.md"
    return "its projections are fused: call unfuse_qkv_projections first" if is_fused(attention) else None


def is_fused(attention: nn.Module) -> bool:
    """Whether q, k and v come from one layer."""
    return bool(getattr(attention, "fused_projections", False))


def attach_products(attention: Any, scores: LayerGrids | None, mix: LayerGrids | None, clock: StepClock) -> None:
    """Give an attention its two products and the processor that uses them, which nothing but `detach_products` takes away."""
    kind = PROCESSORS[type(attention.processor).__name__]
    attention.add_module(SCORES, QuantizedProduct(scores, clock))
    attention.add_module(MIX, QuantizedProduct(mix, clock))
    attention.set_processor(kind(attention.processor))
    attention.set_processor = attention.fuse_projections = _refuse


def detach_products(attention: Any) -> None:
    """Give an attention its own processor and methods back."""
    del attention.set_processor, attention.fuse_projections
    delattr(attention, SCORES)
    delattr(attention, MIX)
    attention.set_processor(attention.processor.original)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "attention of a quantized denoiser keeps its processor and its projections: without them its products would run in float. "
        "Leave out attention slicing, xformers, other processors and fused projections"
    )
