"""Insertion into a whole U-Net: float mode is the original bit for bit, and each mode runs what it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from tcaq.errors import PlanError
from tcaq.layers.attention import ProductProcessor
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.dequantize import dequantize_layers
from tcaq.layers.insert import channel_axis, insert, list_layers, quantized_layers
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode, faking, floating, moded, observing, running
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.affine import fake_quantize, qparams
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.clock import StepClock
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Log2Grid
from tcaq.spec.plan import LayerGrids, Plan, ResolvedPlan, Rule
from tcaq.spec.steps import StepGroups

EIGHT = AffineGrid(bits=8)


def build() -> UNet2DModel:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    return unet.eval()


EVERYTHING = Plan(rules=(Rule(match="*", weight=EIGHT, input=EIGHT, left=EIGHT, right=EIGHT),))


def inserted(plan: Plan = EVERYTHING) -> tuple[UNet2DModel, StepClock]:
    unet, clock = build(), StepClock(StepGroups(boundaries=(500.0,)))
    insert(unet, plan.resolve(list_layers(unet)), clock)
    return unet, clock


def calibrate(unet: nn.Module, run: Callable[[], object]) -> None:
    """Min-max ranges for every weight and for every operand that one pass shows."""

    def show(module: nn.Module, values: tuple[Tensor, ...]) -> None:
        assert isinstance(module, QuantizedWeight | QuantizedProduct)
        for quantizer, value in zip(module.operands.values(), values, strict=True):
            if isinstance(quantizer, AffineQuantizer):
                grid = quantizer.grid
                rows = qparams(value.min(), value.max(), grid.bits, grid.signed, grid.symmetric)
                quantizer.set_rows(*(row.expand(quantizer.clock.count) for row in rows))

    hooks = [layer.register_forward_pre_hook(show) for _, layer in quantized_layers(unet)]
    with observing(unet), torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    for _, layer in quantized_layers(unet):
        if isinstance(layer, QuantizedWeight):
            weight, grid = layer.equalized_weight().detach(), layer.weight_quantizer.grid
            flat = weight.flatten(1)
            rows = qparams(flat.amin(1), flat.amax(1), grid.bits, grid.signed, grid.symmetric)
            layer.weight_quantizer.set_rows(*rows, weight)


INPUTS = [(1, 0), (3, 981), (2, torch.tensor([17, 500]))]  # batch, timestep


@torch.no_grad()
def test_float_mode_is_the_original_bit_for_bit_and_observing_is_close() -> None:
    original, (unet, _) = build(), inserted()
    torch.manual_seed(1)
    for batch, timestep in INPUTS:
        x = torch.randn(batch, 1, 8, 8)
        expected = original(x, timestep).sample
        with floating(unet):
            assert torch.equal(unet(x, timestep).sample, expected)
        with observing(unet):
            torch.testing.assert_close(unet(x, timestep).sample, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_eight_bits_are_close_to_float_and_four_are_not() -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 1, 8, 8)
    expected = build()(x, 300).sample
    errors = {}
    for bits in (4, 8):
        grid = AffineGrid(bits=bits)
        unet, _ = inserted(Plan(rules=(Rule(match="*", weight=grid, input=grid, left=grid, right=grid),)))
        calibrate(unet, lambda unet=unet: unet(x, 300))
        actual = unet(x, 300).sample
        errors[bits] = float((actual - expected).norm() / expected.norm())
    assert 0 < errors[8] < 0.04
    assert errors[4] > 5 * errors[8]


def test_every_layer_is_listed_once_and_swapped_for_a_layer_of_its_type() -> None:
    original, (unet, _) = build(), inserted()
    listed = list_layers(original)
    assert len({layer.name for layer in listed}) == len(listed)
    for layer in listed:
        module = unet.get_submodule(layer.name)
        if layer.kind == "conv":
            assert isinstance(module, nn.Conv2d)
            assert isinstance(module, QuantizedConv2d)
            assert channel_axis(module) == 1
        elif layer.kind == "linear":
            assert isinstance(module, nn.Linear)
            assert isinstance(module, QuantizedLinear)
            assert channel_axis(module) == -1
        else:
            assert isinstance(module, QuantizedProduct)
    plain = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in original.modules())
    attentions = sum(isinstance(m, Attention) for m in original.modules())
    assert len(listed) == plain + 2 * attentions
    assert sorted(name for name, _ in quantized_layers(unet)) == sorted(layer.name for layer in listed)
    assert list_layers(unet) == listed
    weighted = [(name, layer) for name, layer in quantized_layers(unet) if isinstance(layer, QuantizedWeight)]
    assert len(weighted) == plain
    for name, layer in weighted:
        assert torch.equal(layer.float_weight(), original.get_submodule(name).weight)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_other_convolutions_stay_float_and_say_why(kind: type[nn.Module]) -> None:
    (layer,) = list_layers(nn.ModuleDict({"other": kind(2, 3, 3)}))
    assert (
        layer.fixed
        == f"{kind.__name__}: of convolutions, only two-dimensional ones that are not transposed are quantized"
    )


def stop(as_expected: bool) -> None:
    assert as_expected
    raise RuntimeError("stop")


def test_modes_are_restored_after_exceptions_and_part_by_part() -> None:
    unet, _ = inserted()
    parts = moded(unet)
    assert {part.mode for part in parts} == {Mode.FAKE}
    parts[0].mode = Mode.OBSERVE
    with floating(unet):
        assert {part.mode for part in parts} == {Mode.FLOAT}
        with pytest.raises(RuntimeError, match="stop"), faking(unet):
            stop({part.mode for part in parts} == {Mode.FAKE})
        with running(unet, Mode.OBSERVE):
            assert {part.mode for part in parts} == {Mode.OBSERVE}
        assert {part.mode for part in parts} == {Mode.FLOAT}
    assert [part.mode for part in parts] == [Mode.OBSERVE] + [Mode.FAKE] * (len(parts) - 1)


def test_a_model_is_quantized_only_once() -> None:
    unet, clock = inserted()
    with pytest.raises(PlanError, match="the model is quantized already; load the original model"):
        insert(unet, EVERYTHING.resolve(list_layers(unet)), clock)


@pytest.mark.parametrize(
    "absent",
    [
        LayerGrids(name="conv_nowhere", kind="conv", weight=EIGHT, inputs=(EIGHT,)),
        LayerGrids(name="conv_in", kind="linear", weight=EIGHT, inputs=(EIGHT,)),
        LayerGrids(name="mid_block.attentions.7.scores", kind="scores", inputs=(EIGHT, EIGHT)),
    ],
)
def test_a_plan_for_another_model_changes_nothing(absent: LayerGrids) -> None:
    unet = build()
    plan = EVERYTHING.resolve(list_layers(unet))
    with pytest.raises(PlanError, match=f"layers that the model does not have: '{absent.name}'"):
        insert(unet, ResolvedPlan(layers=(*plan.layers, absent)), StepClock(StepGroups()))
    assert moded(unet) == []
    assert not any(isinstance(m.processor, ProductProcessor) for m in unet.modules() if isinstance(m, Attention))


@torch.no_grad()
def test_what_the_plan_keeps_in_float_computes_in_float() -> None:
    keep = Plan(
        rules=(
            Rule(match="*", kinds=("scores", "mix"), reason="products stay float here"),
            Rule(match="conv_out", reason="the last layer stays float here"),
            Rule(match="*", weight=EIGHT, input=EIGHT),
        )
    )
    unet, _ = inserted(keep)
    layers = dict(quantized_layers(unet))
    assert not any(isinstance(layer, QuantizedProduct) for layer in layers.values())
    assert type(unet.conv_out) is nn.Conv2d
    assert type(unet.conv_in) is QuantizedConv2d
    product = next(m for m in unet.modules() if isinstance(m, QuantizedProduct))
    left, right = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 8, 4)
    assert product.operands == {}
    assert product.mode is Mode.FAKE
    assert torch.equal(product(left, right), left @ right)
    nothing, _ = inserted(Plan(rules=(Rule(match="*", reason="all float"),)))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(nothing(x, 5).sample, build()(x, 5).sample)


def test_products_equal_products_of_explicitly_quantized_operands() -> None:
    torch.manual_seed(0)
    clock = StepClock(StepGroups(boundaries=(500.0,)))
    clock.set(torch.tensor([900, 100]))
    four = AffineGrid(bits=4)
    scores = QuantizedProduct(LayerGrids(name="a.scores", kind="scores", inputs=(four, four)), clock)
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 5)
    scores.operands["left"].set_rows(torch.tensor([0.2, 0.3]), torch.tensor([8.0, 7.0]))  # type: ignore[call-arg]
    scores.operands["right"].set_rows(torch.tensor([0.25, 0.1]), torch.tensor([6.0, 9.0]))  # type: ignore[call-arg]
    for i, (a, za, b, zb) in enumerate([(0.3, 7.0, 0.1, 9.0), (0.2, 8.0, 0.25, 6.0)]):
        left = fake_quantize(q[i], torch.tensor(a), torch.tensor(za), 0, 15)
        right = fake_quantize(k[i], torch.tensor(b), torch.tensor(zb), 0, 15)
        torch.testing.assert_close(scores(q, k)[i], left @ right, rtol=1e-6, atol=1e-6)
    mix = QuantizedProduct(LayerGrids(name="a.mix", kind="mix", inputs=(Log2Grid(bits=3), four)), clock)
    p, v = torch.softmax(3 * torch.randn(2, 3, 5, 5), -1), torch.randn(2, 3, 5, 8)
    mix.operands["right"].set_rows(torch.tensor([0.3, 0.3]), torch.tensor([8.0, 8.0]))  # type: ignore[call-arg]
    expected = fake_quantize_log2(p, torch.tensor(1.0), 3) @ fake_quantize(
        v, torch.tensor(0.3), torch.tensor(8.0), 0, 15
    )
    torch.testing.assert_close(mix(p, v), expected, rtol=1e-6, atol=1e-6)
    mix.mode = Mode.OBSERVE
    assert torch.equal(mix(p, v), p @ v)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale_qk", [False, True])
@torch.no_grad()
def test_explicit_attention_is_diffusers_attention(cross: bool, masked: bool, scale_qk: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(
        query_dim=16, cross_attention_dim=12 if cross else None, heads=2, dim_head=8, bias=True, scale_qk=scale_qk,
        residual_connection=True, rescale_output_factor=1.7, norm_num_groups=4,
    ).eval()  # fmt: skip
    hidden = torch.randn(3, 6, 16)
    context = torch.randn(3, 5, 12) if cross else None
    mask = None
    if masked:
        mask = torch.zeros(3, 1, 5 if cross else 6)
        mask[1, :, 2:] = -10000.0
    expected = attention(hidden, encoder_hidden_states=context, attention_mask=mask)
    assert scale_qk != isinstance(attention.processor, AttnProcessor)
    holder = nn.ModuleDict({"attn": attention})
    insert(holder, EVERYTHING.resolve(list_layers(holder)), StepClock(StepGroups()))
    with floating(holder):
        assert torch.equal(attention(hidden, encoder_hidden_states=context, attention_mask=mask), expected)
    with observing(holder):
        actual = attention(hidden, encoder_hidden_states=context, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scores_beyond_the_largest_half_are_those_of_fused_attention() -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=64, heads=1, dim_head=64).eval().half()
    for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
        layer.weight.copy_(torch.eye(64))
    hidden = (40 * torch.randn(1, 6, 64)).half()  # a token meets itself in 64 * 40^2, more than float16 holds
    expected = attention(hidden)
    holder = nn.ModuleDict({"attn": attention})
    insert(holder, EVERYTHING.resolve(list_layers(holder)), StepClock(StepGroups()))
    with observing(holder):
        torch.testing.assert_close(attention(hidden), expected, rtol=2e-3, atol=2e-3)
    calibrate(holder, lambda: attention(hidden))
    assert float((attention(hidden) - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
def test_attention_whose_products_stay_float_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = inserted(Plan(rules=(Rule(match="*", kinds=("scores", "mix"), reason="products stay float here"),
                                   Rule(match="*", weight=EIGHT, input=EIGHT))))  # fmt: skip
    monkeypatch.setattr(QuantizedProduct, "forward", lambda *_: pytest.fail("a product was made by itself"))
    x = torch.randn(2, 1, 8, 8)
    for mode in Mode:
        with running(unet, mode):
            unet(x, 300)


@torch.no_grad()
def test_the_state_round_trips_strictly() -> None:
    plan = Plan(
        rules=(
            Rule(match="*", kinds=("mix",), left=AdaptiveGrid(bits=4), right=EIGHT),
            Rule(match="*", weight=AffineGrid(bits=3), input=EIGHT, left=EIGHT, right=EIGHT),
        )
    )
    (unet, _), (fresh, _) = inserted(plan), inserted(plan)
    x = torch.randn(2, 1, 8, 8)
    calibrate(unet, lambda: unet(x, 300))
    assert not torch.equal(unet(x, 300).sample, fresh(x, 300).sample)
    fresh.load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(unet(x, 300).sample, fresh(x, 300).sample)


@torch.no_grad()
def test_dequantized_layers_are_plain_and_hold_the_quantized_values() -> None:
    unet, _ = inserted()
    x = torch.randn(2, 1, 8, 8)
    calibrate(unet, lambda: unet(x, 300))
    values = {
        name: layer.quantized_weight(torch.float32)
        for name, layer in quantized_layers(unet)
        if isinstance(layer, QuantizedWeight)
    }
    dequantize_layers(unet, torch.float32)
    original = build()
    assert [(n, type(m)) for n, m in unet.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert unet.state_dict().keys() == original.state_dict().keys()
    for name, value in values.items():
        assert torch.equal(unet.get_submodule(name).weight, value)
    original.load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(unet(x, 300).sample, original(x, 300).sample)
