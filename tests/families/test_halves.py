"""Guidance whose halves have texts of unequal length is reconstructed: no batch mixes them, and both count."""

from __future__ import annotations

import pytest
import torch

from tcaq.layers.insert import insert
from tcaq.models.denoiser import attach_clock, clock_of
from tcaq.models.inputs import Inputs
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import default_plan, execution_order, resolve
from tcaq.spec.recipe import Gptq, Grouping, RangeSearch, Reconstruction
from tcaq.spec.steps import StepGroups
from tcaq.stages.group import group
from tcaq.stages.learn import Fit
from tcaq.stages.observe import observe
from tcaq.stages.reconstruct import Reconstructor, apply_unit, measure, quantized_outputs
from tcaq.stages.round import Hessians, Rounder, round_layer
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights

from .tiny import conditional_unet

SEARCH = RangeSearch(values=300, weight_candidates=2, input_candidates=2)
IMAGES, TIMES = 3, (900.0, 100.0)


def build():
    """A U-Net asked twice a step for three images: once with texts of three tokens, once with texts of five."""
    torch.manual_seed(0)
    unet, draw = conditional_unet(block_out_channels=(4, 8), norm_num_groups=2), torch.Generator().manual_seed(1)
    texts = [torch.randn(IMAGES, length, 16, generator=draw) for length in (3, 5)]
    noise = {time: torch.randn(IMAGES, 4, 8, 8, generator=draw) for time in TIMES}
    calls = [
        Inputs(noise[time], torch.full((IMAGES,), time), {"encoder_hidden_states": text}, {})
        for time in TIMES
        for text in texts
    ]
    trajectories = Trajectories.recorded(calls)
    groups = StepGroups.of("per-step", trajectories.timesteps.tolist())
    insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, groups))
    ranges = observe(unet, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(unet, scale_weights(unet, ranges, SEARCH))
    apply_input_scales(unet, scale_inputs(unet, ranges, SEARCH))
    with torch.no_grad():
        units = execution_order(unet, lambda: calls[0](unet))
    return unet, [unit for unit in units if "mid_block" in unit.name], units, trajectories, ranges


@pytest.fixture(scope="module")
def scene():
    return build()


def test_units_are_fitted_to_both_halves(scene):
    unet, middle, units, trajectories, _ = scene
    spec = Reconstruction(iterations=30, batch=4, inputs=12, drop=0.5)
    with Reconstructor(unet, units, trajectories, Fit(spec, 30), memory=1.0) as reconstructor:
        block = next(unit for unit in middle if "transformer_blocks" in unit.name)
        lessons = reconstructor._lessons(block)
        assert [len(part) for part in lessons.parts] == [6, 6]
        lengths = [part.inputs.kwargs["encoder_hidden_states"].shape[1] for part in lessons.parts]
        assert sorted(lengths) == [3, 5]
        _, divisors = measure(block, lessons, clock_of(unet), spec)
        relative = torch.cat(
            [
                lessons.parts[number].distance(outputs, rows, spec.power) / divisors[number][rows]
                for outputs, number, rows in quantized_outputs(block, lessons, clock_of(unet), spec.batch)
            ]
        )
        # both halves of a timestep are in one step group, and its mean is over both
        assert float(relative.mean()) == pytest.approx(1.0, rel=1e-4)
        for unit in middle:
            record = reconstructor.fit(unit.name)
            assert record.meta["loss_after"] <= record.meta["loss_before"]
            apply_unit(unit, record)


def test_batches_are_drawn_from_each_half_as_often_as_it_is_long(scene):
    unet, middle, units, trajectories, _ = scene
    spec = Reconstruction(iterations=1, batch=4, inputs=12)
    with Reconstructor(unet, units, trajectories, Fit(spec, 1), memory=1.0) as reconstructor:
        lessons = reconstructor._lessons(middle[0])
    draw = torch.Generator().manual_seed(0)
    drawn = [lessons.draw(4, draw) for _ in range(200)]
    assert 70 < sum(number for number, _ in drawn) < 130
    assert all(len(rows) == 4 for _, rows in drawn)
    assert {int(row) for _, rows in drawn for row in rows} == set(range(6))


def test_step_groups_are_learned_from_both():
    unet, _, _, trajectories, ranges = build()
    record = group(unet, trajectories, ranges, SEARCH, Grouping(iterations=3, inputs=8, batch=2, groups=2), 0)
    assert len(record.meta["losses"]) == 3
    assert record.tensors["classes"].shape == (4,)


def test_error_feedback_sees_the_texts_of_both():
    """The keys of a block: their input is the text alone, so that the Hessian can be written down."""
    unet, middle, units, trajectories, _ = build()
    block = next(unit for unit in middle if "transformer_blocks" in unit.name)
    keys = block.module.attn2.to_k
    start = keys.weight_quantizer.codes.clone()
    with Rounder(unet, units, trajectories, Gptq(inputs=12, batch=4), 0, memory=1.0) as rounder:
        record = rounder.round(block.name)
    rounded = keys.weight_quantizer.codes.clone()
    keys.weight_quantizer.codes.copy_(start)
    hessians = Hessians(keys, 4096)
    for call in trajectories.calls():  # twelve inputs are all there are
        clock_of(unet).set(call.timestep)
        hessians.add(call.rows["encoder_hidden_states"])
    errors = round_layer(keys, hessians, Gptq().damping)
    assert float((keys.weight_quantizer.codes == rounded).float().mean()) > 0.99  # another order of sums may tip a tie
    assert record.meta["errors"]["attn2.to_k"]["gptq"] == pytest.approx(errors["gptq"], rel=1e-3)
    assert errors["gptq"] < errors["nearest"]
