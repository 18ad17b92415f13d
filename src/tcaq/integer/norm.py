"""Group norm of tokens without turning them over: attention's own, which PyTorch only runs in place on images."""

from __future__ import annotations

from torch import Tensor, nn


class TokenGroupNorm(nn.GroupNorm):
    """A GroupNorm for [batch, channels, tokens] whose channels lie beside each other, as they do in channels-last activations.

    PyTorch normalizes images in that layout, but copies sequences into one with channels apart, and all layers behind it turn
    their input back. A sequence is an image of one row.
    """

    @classmethod
    def of(cls, norm: nn.GroupNorm) -> TokenGroupNorm:
        """The same norm, its parameters shared."""
        own = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, device="meta")
        own.weight, own.bias = norm.weight, norm.bias
        return own.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, float [batch, channels, ...]; channels of tokens lie beside each other afterwards."""
        if x.dim() != 3:
            return super().forward(x)
        batch, channels, tokens = x.shape
        # by way of one axis: a batch of one may come with any stride, by which PyTorch takes it for another layout
        image = x.mT.reshape(-1).view(batch, 1, tokens, channels).permute(0, 3, 1, 2)
        return super().forward(image).squeeze(2)


def keep_token_layout(denoiser: nn.Module) -> None:
    """Give every attention that norms its tokens by groups such a norm."""
    for module in denoiser.modules():
        norm = getattr(module, "group_norm", None)
        if type(norm) is nn.GroupNorm:
            module.group_norm = TokenGroupNorm.of(norm)
