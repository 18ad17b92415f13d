"""Models small enough to run in milliseconds, shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from tcaq.checkpoint import pack
from tcaq.layers.insert import insert, quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.config import TcaqConfig
from tcaq.models.denoiser import attach_clock
from tcaq.models.units import default_plan, resolve
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.steps import StepGroups


def build_pipeline(channels: tuple[int, ...] = (8, 16, 16), attention: int = 1) -> DDIMPipeline:
    """A random DDIM pipeline with a resolution for each number of channels, and attention at one of them."""
    levels = len(channels)
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(levels)),
        up_block_types=tuple("AttnUpBlock2D" if levels - 1 - i == attention else "UpBlock2D" for i in range(levels)),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler(num_train_timesteps=1000))


def quantize_randomly(unet: nn.Module, weights: int = 4, activations: int = 8, groups: int = 3) -> TcaqConfig:
    """Insert the default plan and give every quantizer a valid state that differs from its initial one."""
    generator = torch.Generator().manual_seed(1)
    plan = resolve(unet, default_plan(unet, weights, activations))
    steps = StepGroups(boundaries=tuple(1000.0 * g / groups for g in range(1, groups)))
    insert(unet, plan, attach_clock(unet, steps))

    def positive(count: int, low: float = 0.5) -> torch.Tensor:
        return low + torch.rand(count, generator=generator)

    for _, layer in quantized_layers(unet):
        for quantizer in layer.operands.values():
            if isinstance(quantizer, AffineQuantizer):
                zero = torch.randint(100, 156, (groups,), generator=generator) * 2.0 ** (quantizer.grid.bits - 8)
                quantizer.set_rows(positive(groups) * 8 / 2**quantizer.grid.bits, zero.round())
            elif isinstance(quantizer, ProbabilityQuantizer):
                use_log2 = torch.arange(groups) % 2 == 0
                quantizer.set_rows(positive(groups) / quantizer.last, positive(groups), use_log2)
        if isinstance(layer, QuantizedWeight):
            layer.equalizer.copy_(positive(len(layer.equalizer), low=1.0))
            weight = layer.equalized_weight().detach()
            grid = layer.weight_quantizer.grid
            scale, zero = search_range(
                weight.flatten(1), grid.bits, signed=grid.signed, symmetric=grid.symmetric, power=2.4, candidates=3
            )
            layer.weight_quantizer.set_rows(scale, zero, weight)
    return TcaqConfig(plan=plan, groups=steps, recipe={"program": "random", "seed": 1})


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., DDIMPipeline]:
    """Builds a float pipeline; equal weights at every call."""
    return build_pipeline


@pytest.fixture(scope="session")
def quantized_tiny() -> Callable[..., DDIMPipeline]:
    """Quantizes a pipeline's U-Net in place and packs it; returns the pipeline."""

    def quantize(pipe: DDIMPipeline, **options: int) -> DDIMPipeline:
        pack(pipe.unet, quantize_randomly(pipe.unet, **options))
        return pipe

    return quantize
