"""Attention whose two products are layers of the plan: what every kind of it shares, and self- and cross-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.layers.product import QuantizedProduct

SCORES, MIX = "scores", "mix"


def runs_float(attn: nn.Module) -> bool:
    """Whether an attention takes the original arithmetic now."""
    return all(cast(QuantizedProduct, getattr(attn, name)).is_float for name in (SCORES, MIX))


def attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax between the two separate products of an attention.

    Args: q, k, v: float [batch, heads, tokens, dim], keys and values with tokens of their own; mask: added to the scores.
    Returns: float [batch, tokens, heads * dim].
    """
    products = cast(Any, attn)
    scores = products.scores(q, k.transpose(-1, -2), scale=scale)
    if mask is not None:
        scores = scores + mask
    mixed = products.mix.of_softmax(scores, v) if hasattr(products.mix, "of_softmax") else None
    if mixed is None:
        mixed = products.mix(probabilities_of(scores, attn).to(v.dtype), v)
    return cast(Tensor, mixed).transpose(1, 2).flatten(2)


def probabilities_of(scores: Tensor, attn: nn.Module) -> Tensor:
    """Softmax over the last axis, of scores of half precision in float32."""
    half = scores.dtype in (torch.float16, torch.bfloat16)  # whose few digits a sum over many tokens would lose
    upcast = half or getattr(attn, "upcast_softmax", False)
    return torch.softmax(scores.float() if upcast else scores, dim=-1)


def heads(attn: nn.Module, x: Tensor) -> Tensor:
    """[batch, tokens, heads * dim] to [batch, heads, tokens, dim]."""
    return x.reshape(*x.shape[:-1], cast(int, attn.heads), -1).transpose(1, 2)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """`x` after a norm, if there is one."""
    return x if norm is None else cast(Tensor, norm(x))


class ProductProcessor:
    """A processor for diffusers' `Attention`: the original one in float mode, bit for bit, and explicit products otherwise."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        """Attend over tokens; the arguments and the result are those of diffusers' processors."""
        if runs_float(attn):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return _attend(cast(Any, attn), hidden_states, encoder_hidden_states, attention_mask, temb)


def _attend(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
) -> Tensor:
    """diffusers' scaled dot-product attention, over tokens or the pixels of an image."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    image_shape = hidden_states.shape if hidden_states.dim() == 4 else None
    if image_shape is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(encoder_hidden_states)
    q = normed(attn.norm_q, heads(attn, attn.to_q(hidden_states)))
    k, v = normed(attn.norm_k, heads(attn, attn.to_k(context))), heads(attn, attn.to_v(context))
    mask = None
    if attention_mask is not None:
        # sizes by `shape`, which a trace follows; it would freeze `len`
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
        mask = mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
    mixed = attn.to_out[1](attn.to_out[0](attend(attn, q, k, v, attn.scale, mask)))
    if image_shape is not None:
        mixed = mixed.transpose(-1, -2).reshape(image_shape)
    if attn.residual_connection:
        mixed = mixed + residual
    return cast(Tensor, mixed / attn.rescale_output_factor)
