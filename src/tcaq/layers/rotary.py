"""Attention with rotary position embeddings over text and image tokens, as in FLUX."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from tcaq.layers.attention import ProductProcessor, attend, heads, runs_float


class RotaryProductProcessor(ProductProcessor):
    """For diffusers' `FluxAttention`; text tokens come first. q and k are quantized as they are multiplied: turned."""

    def __call__(  # type: ignore[override]
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Attend over tokens; a block of a single stream passes all of them as `hidden_states` and projects the result itself."""
        if runs_float(attn):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return _attend(cast(Any, attn), hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def _attend(
    attn: Any, image: Tensor, text: Tensor | None, mask: Tensor | None, turns: tuple[Tensor, Tensor] | None
) -> Any:  # fmt: skip
    q, k = attn.norm_q(heads(attn, attn.to_q(image))), attn.norm_k(heads(attn, attn.to_k(image)))
    v = heads(attn, attn.to_v(image))
    if attn.added_kv_proj_dim is not None:
        q = torch.cat([attn.norm_added_q(heads(attn, attn.add_q_proj(text))), q], dim=2)
        k = torch.cat([attn.norm_added_k(heads(attn, attn.add_k_proj(text))), k], dim=2)
        v = torch.cat([heads(attn, attn.add_v_proj(text)), v], dim=2)
    if turns is not None:
        q, k = apply_rotary_emb(q, turns), apply_rotary_emb(k, turns)
    mixed = attend(attn, q, k, v, q.shape[-1] ** -0.5, mask)
    if text is None:
        return mixed
    others, own = mixed[:, : text.shape[1]], mixed[:, text.shape[1] :]
    return attn.to_out[1](attn.to_out[0](own)), attn.to_add_out(others)
