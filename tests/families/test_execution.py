"""Every family's denoiser after insertion: bit for bit the original in float, and each layer in one unit, in order."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tcaq.errors import ModelError
from tcaq.layers.dequantize import dequantize_layers
from tcaq.layers.insert import insert, list_layers, quantized_layers
from tcaq.layers.modes import faking, floating, observing
from tcaq.layers.split import SplitLinear
from tcaq.models.architectures import remark
from tcaq.models.denoiser import attach_clock, find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import record
from tcaq.models.time import time_unit
from tcaq.models.trajectories import predict
from tcaq.models.units import check_reached, concatenations, default_plan, execution_order, resolve
from tcaq.spec.recipe import RangeSearch
from tcaq.spec.steps import StepGroups
from tcaq.stages.draw import draw_parts
from tcaq.stages.equalize import prevailing_kinds
from tcaq.stages.observe import observe
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights

from .tiny import FAMILIES, conditional_unet, conditions_of, flux, pipeline_of

EVERY = pytest.mark.parametrize("name", FAMILIES)
SEARCH = RangeSearch(values=300, weight_candidates=1, input_candidates=1)


def inserted(name, dtype=torch.float32, bits=8, steps=2, **options):
    """A family's denoiser with quantized layers, its trajectories, and the float model's predictions on them."""
    pipe = pipeline_of(name, dtype)
    _, trajectories = record(pipe, (1, 2), steps, resolve_conditions(pipe, conditions_of(name)))
    denoiser = find_denoiser(pipe)[1]
    expected = predict(denoiser, trajectories)
    groups = StepGroups.of("per-step", trajectories.timesteps.tolist())
    insert(denoiser, resolve(denoiser, default_plan(denoiser, bits, bits, **options)), attach_clock(denoiser, groups))
    return denoiser, trajectories, expected


def calibrate(denoiser, trajectories):
    ranges = observe(denoiser, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(denoiser, scale_weights(denoiser, ranges, SEARCH))
    apply_input_scales(denoiser, scale_inputs(denoiser, ranges, SEARCH))


@EVERY
@pytest.mark.parametrize("split", [False, True])
def test_float_mode_is_the_original_bit_for_bit_and_observing_is_close(name, split):
    denoiser, trajectories, expected = inserted(name, split=split)
    with floating(denoiser):
        assert torch.equal(predict(denoiser, trajectories), expected)
    with observing(denoiser):
        torch.testing.assert_close(predict(denoiser, trajectories), expected, rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_in_float_and_near_in_eight_bits(name, dtype):
    if name.startswith("ldm"):  # whose pipeline draws its noise in float32, whatever the model is
        with pytest.raises(ModelError, match="LDMPipeline does not run in half precision"):
            inserted(name, dtype)
        return
    denoiser, trajectories, expected = inserted(name, dtype)
    assert expected.dtype == dtype
    with floating(denoiser):
        assert torch.equal(predict(denoiser, trajectories), expected)
    calibrate(denoiser, trajectories)
    with faking(denoiser):
        actual = predict(denoiser, trajectories)
    assert actual.dtype == dtype
    assert float((actual.float() - expected.float()).norm() / expected.float().norm()) < 0.12


@EVERY
def test_units_hold_every_layer_once_in_the_order_of_execution(name):
    denoiser, trajectories, _ = inserted(name)
    first = next(trajectories.calls())[:1]
    with torch.no_grad():
        units = execution_order(denoiser, lambda: first(denoiser))
        reached = []
        handles = [u.module.register_forward_pre_hook(lambda *_, n=u.name: reached.append(n)) for u in units]
        first(denoiser)
    for handle in handles:
        handle.remove()
    assert list(dict.fromkeys(reached)) == [unit.name for unit in units]
    held = [layer for unit in units for _, layer in quantized_layers(unit.module)]
    assert len(held) == len(set(held)) == sum(1 for _ in quantized_layers(denoiser))
    blocks = {type(unit.module).__name__ for unit in units}
    assert any("Block" in block for block in blocks)


@EVERY
def test_every_layer_and_all_four_operands_of_attention_are_quantized(name):
    denoiser = find_denoiser(pipeline_of(name))[1]
    table = resolve(denoiser, default_plan(denoiser, 4, 6)).layers
    assert [layer.name for layer in table if layer.is_float] == []
    attentions = [m for m in denoiser.modules() if hasattr(m, "set_processor")]
    assert attentions
    for kind in ("scores", "mix"):
        rows = [layer for layer in table if layer.kind == kind]
        assert len(rows) == len(attentions)
        assert all(len(row.inputs) == 2 for row in rows)
    eight = [layer.name for layer in table if layer.weight is not None and layer.weight.bits == 8]
    assert len(eight) >= 4  # the edges and the time embedding
    assert len(eight) < len(table) / 2


@EVERY
def test_mixed_timesteps_of_a_batch_have_each_their_group(name):
    denoiser, trajectories, _ = inserted(name, bits=4)
    calibrate(denoiser, trajectories)
    drawn = draw_parts(trajectories, 10**6, 0)[0]
    assert len(drawn.timestep.unique()) > 1
    with faking(denoiser), torch.no_grad():
        together = drawn(denoiser)
        apart = torch.cat([part(denoiser) for part in drawn.split(1)])
    # a last digit may move a value to the next code
    assert float((together - apart).norm() / apart.norm()) < 0.05


@EVERY
def test_a_grid_for_each_token_needs_no_step_groups(name):
    denoiser, trajectories, expected = inserted(name, tokens=True)
    ranges = observe(denoiser, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(denoiser, scale_weights(denoiser, ranges, SEARCH))
    written = scale_inputs(denoiser, ranges, SEARCH)
    apply_input_scales(denoiser, written)
    dynamic = [
        n for n, layer in quantized_layers(denoiser) if "TokenQuantizer" in repr(type(layer.operands.get("input")))
    ]
    assert dynamic
    assert not any(f"{layer}|input|scale" in written.tensors for layer in dynamic)
    with faking(denoiser):
        actual = predict(denoiser, trajectories)
    assert float((actual - expected).norm() / expected.norm()) < 0.12


@EVERY
def test_dequantized_it_is_a_plain_model_again(name):
    denoiser, trajectories, expected = inserted(name, split=True)
    calibrate(denoiser, trajectories)
    original = find_denoiser(pipeline_of(name))[1]
    dequantize_layers(denoiser, torch.float32)
    keys = {key for key in denoiser.state_dict() if "step_clock" not in key}
    assert keys == set(original.state_dict())
    actual = predict(denoiser, trajectories)
    assert float((actual - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("size", [(13, 9), (5, 8)])
def test_odd_sizes(size):
    torch.manual_seed(0)
    unet = conditional_unet(in_channels=9)  # as for inpainting
    x, text = torch.randn(2, 9, *size), torch.randn(2, 7, 16)
    with torch.no_grad():
        expected = unet(x, torch.tensor([900, 3]), text).sample
        insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, StepGroups(boundaries=(500.0,))))
        with floating(unet):
            assert torch.equal(unet(x, torch.tensor([900, 3]), text).sample, expected)
        with faking(unet):
            assert unet(x, torch.tensor([900, 3]), text).sample.shape == (2, 4, *size)


def test_flux_reads_two_tensors_in_one_layer_and_each_can_have_grids_of_its_own():
    torch.manual_seed(0)
    transformer = flux().transformer
    joints = concatenations(transformer)
    assert joints == {"single_transformer_blocks.0.proj_out": 16}  # of 16 + 64 features
    insert(
        transformer,
        resolve(transformer, default_plan(transformer, 8, 8, split=True)),
        attach_clock(transformer, StepGroups()),
    )
    layer = transformer.get_submodule("single_transformer_blocks.0.proj_out")
    assert isinstance(layer, SplitLinear)
    assert (layer.first.in_features, layer.second.in_features) == (16, 64)
    assert layer.second.bias is None


def test_a_time_path_that_reads_more_than_the_timestep_is_refused():
    assert time_unit(conditional_unet()).name == "time"
    with pytest.raises(ModelError, match="addition_embed_type"):
        time_unit(find_denoiser(pipeline_of("sdxl"))[1])
    with pytest.raises(ModelError, match="no time embedding"):
        time_unit(find_denoiser(pipeline_of("dit"))[1])


def test_attention_that_no_table_knows_stays_float_and_says_why():
    class Own:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    unet = conditional_unet()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Own())
    table = {layer.name: layer for layer in resolve(unet, default_plan(unet, 4, 4)).layers}
    row = table["mid_block.attentions.0.transformer_blocks.0.attn2.scores"]
    assert row.is_float
    assert "processor Own is not known" in row.reason
    assert not table["mid_block.attentions.0.transformer_blocks.0.attn1.scores"].is_float
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    with torch.no_grad():
        expected = unet(x, 5, text).sample
        insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, StepGroups()))
        with floating(unet):
            assert torch.equal(unet(x, 5, text).sample, expected)
        unet(x, 5, text)


class Stranger(nn.Module):
    """A denoiser that no table knows, with a one-dimensional convolution, torch's own attention, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)

    def forward(self, hidden_states, timestep, context):
        x = self.line(hidden_states.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, context, context)[0]
        return (self.twice(torch.relu(self.twice(x))),)


def test_a_denoiser_that_no_table_knows_works_layer_by_layer():
    torch.manual_seed(0)
    stranger = Stranger().eval()
    table = {layer.name: layer for layer in resolve(stranger, default_plan(stranger, 4, 4)).layers}
    assert "only two-dimensional" in table["line"].reason
    assert "MultiheadAttention" in table["attention.out_proj"].reason
    assert not table["twice"].is_float
    x, context = torch.randn(2, 6, 4), torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = stranger(x, torch.tensor(3), context)[0]
        insert(stranger, resolve(stranger, default_plan(stranger, 4, 4)), attach_clock(stranger, StepGroups()))
        with floating(stranger):
            assert torch.equal(stranger(x, torch.tensor(3), context)[0], expected)
        order = execution_order(stranger, lambda: stranger(x, torch.tensor(3), context))
    assert [unit.name for unit in order] == ["twice"]
    assert list_layers(stranger)[0].fixed


def test_a_denoiser_that_no_table_knows_is_said_to_be_one():
    assert "Stranger is in no table" in remark(Stranger())
    assert remark(conditional_unet()) is None


def test_a_layer_that_never_runs_is_named():
    unet = conditional_unet()
    assert isinstance(unet, UNet2DConditionModel)
    unet.spare = nn.Linear(3, 3)
    insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, StepGroups()))
    with torch.no_grad():
        units = execution_order(unet, lambda: unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 16)))
    with pytest.raises(ModelError, match="never runs spare"):
        check_reached(unet, units)


@pytest.mark.parametrize("name", ["dit", "pixart", "sd35", "flux"])
def test_transformers_have_their_linear_layers_equalized(name):
    assert prevailing_kinds(inserted(name)[0]) == ("conv", "linear")
