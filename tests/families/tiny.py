"""A pipeline of every family, small enough to run in milliseconds, built from configs: nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tcaq.spec.conditions import Conditions

from .tokenizers import clip_tokenizer, t5_tokenizer

PROMPTS = ("a cat", "dogs", "sea")


@cache
def clip() -> Any:
    return clip_tokenizer(Path(tempfile.mkdtemp(prefix="tcaq-tokenizer-")))


def clip_encoder(kind: type = CLIPTextModel) -> Any:
    tokenizer = clip()
    return kind(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
            max_position_embeddings=8, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip


def t5_encoder(width: int = 32) -> Any:
    config = T5Config(d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(t5_tokenizer()))
    return T5EncoderModel(config).eval()


def kl_decoder(shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, sample_size=16, shift_factor=shift,
        force_upcast=False,
    ).eval()  # fmt: skip


def vq_decoder() -> VQModel:
    return VQModel(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, num_vq_embeddings=8,
    ).eval()  # fmt: skip


def conditional_unet(**options: Any) -> UNet2DConditionModel:
    defaults: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**(defaults | options)).eval()


def stable_diffusion(**options: Any) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=kl_decoder(), text_encoder=clip_encoder(), tokenizer=clip(), unet=conditional_unet(**options),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> DiffusionPipeline:
    unet = conditional_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8, use_linear_projection=True, transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=kl_decoder(), text_encoder=clip_encoder(), text_encoder_2=clip_encoder(CLIPTextModelWithProjection), tokenizer=clip(),
        tokenizer_2=clip(), unet=unet, scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip


def latent(decoder: Callable[[], Any]) -> DiffusionPipeline:
    unet = UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    return LDMPipeline(decoder(), unet.eval(), DDIMScheduler(clip_sample=False))


def dit() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    return DiTPipeline(transformer.eval(), kl_decoder(), DDIMScheduler(clip_sample=False))


def pixart() -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=32,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=kl_decoder(), transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sd3(**options: Any) -> DiffusionPipeline:
    defaults: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
    }  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(defaults | options)).eval(), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_decoder(0.1), text_encoder=clip_encoder(CLIPTextModelWithProjection), tokenizer=clip(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection), tokenizer_2=clip(), text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux(**options: Any) -> DiffusionPipeline:
    defaults: dict[str, Any] = {
        "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4),
        "guidance_embeds": True,
    }  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl_decoder(0.1), text_encoder=clip_encoder(), tokenizer=clip(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(**(defaults | options)).eval(),
    )  # fmt: skip


TEXT: dict[str, Any] = {"prompts": PROMPTS, "height": 16, "width": 16}
PADDED = TEXT | {"tokens": 6}


@dataclass(frozen=True)
class Family:
    """One row of the table. calls: how often the denoiser is asked for each image at a step; other: a second scheduler."""

    build: Callable[[], DiffusionPipeline]
    conditions: dict[str, Any] = field(default_factory=dict)
    other: str = "DPMSolverMultistepScheduler"
    calls: int = 1
    component: str = "unet"


FAMILIES = {
    "ldm-vq": Family(lambda: latent(vq_decoder), other="PNDMScheduler"),
    "ldm-kl": Family(lambda: latent(kl_decoder)),
    "sd": Family(stable_diffusion, TEXT, calls=2, other="PNDMScheduler"),
    "sd2": Family(lambda: stable_diffusion(use_linear_projection=True, attention_head_dim=(1, 2)), TEXT, calls=2),
    "sdxl": Family(sdxl, TEXT | {"negative": "bad"}, calls=2),
    "dit": Family(dit, {"labels": (1, 7, 999)}, calls=2, component="transformer"),
    "pixart": Family(pixart, PADDED, calls=2, other="EulerDiscreteScheduler", component="transformer"),
    "sd3": Family(sd3, PADDED, calls=2, other="FlowMatchHeunDiscreteScheduler", component="transformer"),
    "sd35": Family(
        lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)), PADDED, calls=2, other="FlowMatchHeunDiscreteScheduler",
        component="transformer",
    ),
    "flux": Family(flux, PADDED, other="DPMSolverMultistepScheduler", component="transformer"),
    "flux-guided": Family(
        lambda: flux(guidance_embeds=False), PADDED | {"negative": "bad", "true_guidance": 2.0}, calls=2, component="transformer",
        other="DPMSolverMultistepScheduler",
    ),
}  # fmt: skip


def pipeline_of(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A family's pipeline; equal weights at every call."""
    torch.manual_seed(0)
    pipe = FAMILIES[name].build()
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def conditions_of(name: str) -> Conditions | None:
    values = FAMILIES[name].conditions
    return Conditions(**values) if values else None
