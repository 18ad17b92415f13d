"""What `tcaq` knows of each denoiser class, as data. How to add one: docs/add-an-architecture.md."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One denoiser class.

    Attributes: units: class names of the blocks that reconstruction fits at once; edges: name patterns of the first and last
        layers, and of those that read the text; entrance: name of the layer that reads x_t; time: name patterns of the time
        embedding's layers; projections: of the layers that bring the embedding into each block; joints: of linear layers whose
        input is put together from two tensors, of which the first is as wide as the layer's output; shared: names of arguments,
        of the denoiser and of its units, without a row for each sample; last: the largest timestep it is given (None: the
        scheduler says); known: whether a table knows it.
    """

    units: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    time: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    joints: tuple[str, ...] = ()
    entrance: str = ""
    shared: tuple[str, ...] = ()
    last: float | None = None
    known: bool = True


EMBEDDERS = ("TimestepEmbedding", "PixArtAlphaTextProjection")
"""Small networks of two layers that embed the timestep, its companions, and pooled text."""

ARCHITECTURES = {
    "UNet2DModel": Architecture(
        units=("ResnetBlock2D", "Attention"),
        edges=("conv_in", "conv_out"),
        time=("time_embedding.*",),
        projections=("*.time_emb_proj",),
        entrance="conv_in",
    ),
    # Stable Diffusion 1 and 2, SDXL, inpainting
    "UNet2DConditionModel": Architecture(
        units=("ResnetBlock2D", "BasicTransformerBlock", "TimestepEmbedding"),
        edges=("conv_in", "conv_out", "encoder_hid_proj", "encoder_hid_proj.*"),
        time=("time_embedding.*", "add_embedding.*", "class_embedding.*"),
        projections=("*.time_emb_proj",),
        entrance="conv_in",
    ),
    "DiTTransformer2DModel": Architecture(
        units=("BasicTransformerBlock",),
        edges=("pos_embed.proj", "proj_out_2"),
        time=("transformer_blocks.*.norm1.emb.*",),
        projections=("transformer_blocks.*.norm1.linear", "proj_out_1"),
        entrance="pos_embed.proj",
    ),
    # PixArt-alpha and -sigma
    "PixArtTransformer2DModel": Architecture(
        units=("BasicTransformerBlock", *EMBEDDERS),
        edges=("pos_embed.proj", "caption_projection.*", "proj_out"),
        time=("adaln_single.emb.*",),
        projections=("adaln_single.linear",),
        entrance="pos_embed.proj",
    ),
    # Stable Diffusion 3 and 3.5
    "SD3Transformer2DModel": Architecture(
        units=("JointTransformerBlock", *EMBEDDERS),
        edges=("pos_embed.proj", "context_embedder", "proj_out"),
        time=("time_text_embed.*",),
        projections=("*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"),
        entrance="pos_embed.proj",
    ),
    "FluxTransformer2DModel": Architecture(
        units=("FluxTransformerBlock", "FluxSingleTransformerBlock", *EMBEDDERS),
        edges=("x_embedder", "context_embedder", "proj_out"),
        time=("time_text_embed.*",),
        projections=(
            "*.norm1.linear",
            "*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
            "norm_out.linear",
        ),
        joints=("single_transformer_blocks.*.proj_out",),
        shared=("img_ids", "txt_ids", "image_rotary_emb"),
        last=1.0,
        entrance="x_embedder",
    ),
}
UNKNOWN = Architecture(known=False)


def architecture(denoiser: nn.Module) -> Architecture:
    """The table's row for a denoiser; an unknown class has every layer as a unit of its own and no special layers."""
    return ARCHITECTURES.get(type(denoiser).__name__, UNKNOWN)


def remark(denoiser: nn.Module) -> str | None:
    """What a user should know of a denoiser that no table knows; None for the others."""
    if architecture(denoiser).known:
        return None
    return (
        f"{type(denoiser).__name__} is in no table of architectures: every convolution and linear layer is a unit of its own, "
        "none is protected by 8 bits, and attention is quantized where its processor is known (docs/add-an-architecture.md)"
    )
