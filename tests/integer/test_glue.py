"""What stands between integer layers: the same numbers as before, in other memory."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

import tcaq
from tcaq.integer.block import IntegerResnetBlock
from tcaq.integer.norm import TokenGroupNorm
from tcaq.layers.insert import quantized_layers


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_normed_where_they_lie(batch: int) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    own, x = TokenGroupNorm.of(norm), torch.randn(batch, 10, 12)
    assert own.weight is norm.weight
    if batch == 1:
        x = x.as_strided(x.shape, (12, 12, 1))  # what reshaping an image of channels last makes of it
    found = own(x.transpose(1, 2))
    torch.testing.assert_close(found, norm(x.transpose(1, 2)))
    assert found.transpose(1, 2).is_contiguous()
    image = torch.randn(2, 12, 5, 5)
    assert torch.equal(own(image), norm(image))


def test_every_attention_of_a_lowered_model_norms_so(tiny_pipeline, quantized_tiny) -> None:
    pipe = quantized_tiny(tiny_pipeline())
    before = [m.group_norm for m in pipe.unet.modules() if isinstance(getattr(m, "group_norm", None), nn.GroupNorm)]
    names = list(pipe.unet.state_dict())
    tcaq.lower(pipe)
    after = [m.group_norm for m in pipe.unet.modules() if isinstance(getattr(m, "group_norm", None), nn.GroupNorm)]
    assert before
    assert [(type(norm), norm.weight, norm.eps) for norm in after] == [
        (TokenGroupNorm, norm.weight, norm.eps) for norm in before
    ]
    assert [name for name in names if "group_norm" in name] == [
        name for name in pipe.unet.state_dict() if "group_norm" in name
    ]


@pytest.mark.parametrize("factor", [1.0, 1.5])
@torch.no_grad()
def test_a_block_in_place_computes_the_same_and_leaves_its_input_alone(
    tiny_pipeline, quantized_tiny, factor: float
) -> None:
    pipe = quantized_tiny(tiny_pipeline(), weights=8, activations=8)
    tcaq.lower(pipe)
    blocks = [module for module in pipe.unet.modules() if isinstance(module, ResnetBlock2D)]
    assert {type(block) for block in blocks} == {IntegerResnetBlock}
    torch.manual_seed(0)
    for block in blocks:
        block.output_scale_factor = factor
        x = torch.randn(3, block.in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
        time = torch.randn(3, block.time_emb_proj.in_features)
        given, given_time = x.clone(), time.clone()
        assert torch.equal(block(x, time), ResnetBlock2D.forward(block, given, given_time))
        assert torch.equal(x, given)
        assert torch.equal(time, given_time)


def test_a_block_with_a_layer_that_stays_float_is_left_as_it_was(tiny_pipeline, quantized_tiny) -> None:
    pipe = quantized_tiny(tiny_pipeline())
    block = next(module for module in pipe.unet.modules() if isinstance(module, ResnetBlock2D))
    block.conv1 = nn.Conv2d(block.in_channels, block.out_channels, 3, padding=1)
    assert any(True for _ in quantized_layers(block))
    tcaq.lower(pipe)
    assert type(block) is ResnetBlock2D
