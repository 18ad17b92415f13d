"""An attention processor for diffusers' `Attention` whose two products are layers of the plan."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tcaq.layers.modes import Mode
from tcaq.layers.product import QuantizedProduct
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids

SCORES, MIX = "scores", "mix"


def attach_products(attention: Attention, scores: LayerGrids | None, mix: LayerGrids | None, clock: StepClock) -> None:
    """Give an attention its two products and the processor that uses them."""
    attention.add_module(SCORES, QuantizedProduct(scores, clock))
    attention.add_module(MIX, QuantizedProduct(mix, clock))
    attention.set_processor(cast(Any, ProductProcessor(attention.processor)))


class ProductProcessor:
    """Runs the original processor in float mode, bit for bit, and explicit products otherwise."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend over tokens; the arguments and the result are those of diffusers' processors."""
        products = cast(QuantizedProduct, attn.scores), cast(QuantizedProduct, attn.mix)
        if all(product.mode is Mode.FLOAT for product in products):
            result = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return cast(Tensor, result)
        return _attend(attn, products, hidden_states, encoder_hidden_states, attention_mask, temb)


def _attend(
    attn: Attention,
    products: tuple[QuantizedProduct, QuantizedProduct],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
) -> Tensor:
    """diffusers' scaled dot-product attention, with softmax between two separate products."""
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
    q = _heads(attn, attn.to_q(hidden_states))
    k, v = _heads(attn, attn.to_k(context)), _heads(attn, attn.to_v(context))
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    scores = products[0](q, k.transpose(-1, -2)) * attn.scale
    if attention_mask is not None:
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        scores = scores + mask.view(len(context), attn.heads, -1, mask.shape[-1])
    probabilities = torch.softmax(scores.float() if attn.upcast_softmax else scores, dim=-1).to(v.dtype)
    mixed = products[1](probabilities, v).transpose(1, 2).flatten(2)
    mixed = attn.to_out[1](attn.to_out[0](mixed))
    if image_shape is not None:
        mixed = mixed.transpose(-1, -2).reshape(image_shape)
    if attn.residual_connection:
        mixed = mixed + residual
    return cast(Tensor, mixed / attn.rescale_output_factor)


def _heads(attn: Attention, x: Tensor) -> Tensor:
    """[batch, tokens, heads * dim] to [batch, heads, tokens, dim]."""
    return x.reshape(*x.shape[:-1], attn.heads, -1).transpose(1, 2)
