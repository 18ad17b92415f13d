"""Joint attention of image and text tokens, as in Stable Diffusion 3 (Esser et al., ICML 2024, figure 2)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.layers.attention import ProductProcessor, attend, heads, normed, runs_float


class JointProductProcessor(ProductProcessor):
    """For diffusers' `Attention` with `JointAttnProcessor2_0`; image tokens come first."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        """Attend over tokens; without text tokens it is self-attention, and one tensor comes back. The original uses no mask."""
        if runs_float(attn):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return _attend(cast(Any, attn), hidden_states, encoder_hidden_states)


def _attend(attn: Any, image: Tensor, text: Tensor | None) -> Any:
    q = normed(attn.norm_q, heads(attn, attn.to_q(image)))
    k, v = normed(attn.norm_k, heads(attn, attn.to_k(image))), heads(attn, attn.to_v(image))
    if text is not None:
        q = torch.cat([q, normed(attn.norm_added_q, heads(attn, attn.add_q_proj(text)))], dim=2)
        k = torch.cat([k, normed(attn.norm_added_k, heads(attn, attn.add_k_proj(text)))], dim=2)
        v = torch.cat([v, heads(attn, attn.add_v_proj(text))], dim=2)
    mixed = attend(attn, q, k, v, q.shape[-1] ** -0.5)
    own, others = mixed[:, : image.shape[1]], mixed[:, image.shape[1] :]
    own = attn.to_out[1](attn.to_out[0](own))
    if text is None:
        return own
    return own, (others if attn.context_pre_only else attn.to_add_out(others))
