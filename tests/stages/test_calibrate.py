"""Observe, equalize, scale and select against direct computation."""

from __future__ import annotations

import math

import pytest
import torch

from tcaq.errors import NumericalError
from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import floating, observing
from tcaq.numerics.equalize import tcr_vector
from tcaq.numerics.ranges import search_range
from tcaq.spec.recipe import Daq, RangeSearch, Tcr
from tcaq.stages.equalize import STRENGTHS, equalize, layer_noise
from tcaq.stages.observe import observe
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights
from tcaq.stages.select import select

from .conftest import SEARCH, build

LAYER = "mid_block.resnets.0.conv1"


def inputs_of(scene, name, argument=0):
    """Every step's input of one layer, caught in a plain pass."""
    caught = []
    layer = scene.unet.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[argument].detach().clone()))
    with observing(scene.unet), torch.no_grad():
        for x, t in zip(scene.trajectories.samples, scene.trajectories.timesteps, strict=True):
            scene.unet(x, t)
    handle.remove()
    return caught


def test_observed_ranges_are_those_of_the_inputs(scene):
    caught = inputs_of(scene, LAYER)
    for k, x in enumerate(caught):
        channels = x.movedim(1, 0).flatten(1)
        assert torch.equal(scene.ranges.tensors[f"{LAYER}|input|low"][k], channels.amin(1))
        assert torch.equal(scene.ranges.tensors[f"{LAYER}|input|high"][k], channels.amax(1))
        torch.testing.assert_close(scene.ranges.tensors[f"{LAYER}|input|square"][k], channels.square().mean(1))
        sampled, places = scene.ranges.tensors[f"{LAYER}|input|rows"][k], x.movedim(1, -1).reshape(-1, x.shape[1])
        assert len(sampled) == SEARCH.values // x.shape[1]
        assert (sampled[:, None] == places[None]).all(-1).any(1).all()  # each is a place of the input, all its channels
        assert len(sampled.unique(dim=0)) > len(sampled) // 4
    operands = {f"{n}|{operand}" for n, layer in quantized_layers(scene.unet) for operand in layer.operands}
    assert {key.rpartition("|")[0] for key in scene.ranges.tensors} - {""} == operands


def test_observing_in_chunks_finds_the_same_ranges(scene, monkeypatch):
    parts = observe(scene.unet, scene.trajectories, SEARCH.values, 3, 0)  # of 4 images
    for name, value in scene.ranges.tensors.items():
        if not name.endswith("|rows"):
            torch.testing.assert_close(parts.tensors[name], value, rtol=1e-4, atol=1e-5)


def test_observing_names_layer_and_step_of_a_nan(scene):
    weight = scene.unet.mid_block.resnets[0].conv1.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"mid_block.resnets.0.conv2.*t = 750"):
        observe(scene.unet, scene.trajectories, 100, 32, 0)


def test_vectors_come_from_the_observed_maxima(scene):
    spec = Tcr(percentile=0.1, truncate=3.0, strength=0.7)
    vectors = equalize(scene.unet, scene.ranges, spec).tensors
    low, high = scene.ranges.tensors[f"{LAYER}|input|low"], scene.ranges.tensors[f"{LAYER}|input|high"]
    maxima = torch.maximum(low.abs(), high.abs())
    expected = tcr_vector(maxima, percentile=0.1, truncate=3.0, strength=0.7)
    assert torch.equal(vectors[LAYER], expected)
    assert expected.max() > 1
    assert not any("time_emb" in name for name in vectors)  # most weights are those of convolutions
    assert any("time_emb" in name for name in equalize(scene.unet, scene.ranges, Tcr(kinds=("conv", "linear"))).tensors)


def test_a_strength_for_each_layer_is_the_one_of_least_predicted_noise(scene):
    spec = Tcr(strength="layer", kinds=("conv", "linear"))
    vectors = equalize(scene.unet, scene.ranges, spec).tensors
    chosen = set()
    for name, vector in vectors.items():
        layer, found = scene.unet.get_submodule(name), {}
        for strength in STRENGTHS:
            fixed = Tcr(strength=strength, linear_strength=strength, kinds=("conv", "linear"))
            tried = equalize(scene.unet, scene.ranges, fixed).tensors[name]
            found[strength] = layer_noise(name, layer, scene.ranges, tried), tried
        best = min(found, key=lambda strength: found[strength][0])
        assert torch.equal(vector, found[best][1])
        chosen.add(best)
    assert len(chosen) > 1


def test_min_max_scales_cover_exactly_the_observed_range(scene):
    plain = RangeSearch(values=64, weight_candidates=1, input_candidates=1)
    apply_weight_scales(scene.unet, scale_weights(scene.unet, scene.ranges, plain))
    record = scale_inputs(scene.unet, scene.ranges, plain)
    apply_input_scales(scene.unet, record)
    for step, x in enumerate(inputs_of(scene, LAYER)):
        group = len(scene.trajectories.timesteps) - 1 - step  # groups ascend in t, trajectories descend
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        assert float(record.tensors[f"{LAYER}|input|scale"][group]) == pytest.approx((high - low) / 15, rel=1e-6)
    layer = scene.unet.get_submodule(LAYER)
    flat = layer.weight.detach().flatten(1)
    spread = flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)
    torch.testing.assert_close(layer.weight_quantizer.scale, spread / 15)
    # every weight sits within half a step of its code
    assert (
        (layer.quantized_weight(torch.float32) - layer.weight).abs().flatten(1).amax(1) <= spread / 30 * 1.001
    ).all()


def test_range_search_of_weights_weighs_by_the_energy_of_the_input(scene):
    record = scale_weights(scene.unet, scene.ranges, SEARCH)
    layer = scene.unet.get_submodule(LAYER)
    energy = scene.ranges.tensors[f"{LAYER}|input|square"].mean(0)
    weights = energy.reshape(1, -1, 1, 1).expand_as(layer.weight).flatten(1)[:1]
    scale, _ = search_range(
        layer.weight.detach().flatten(1), 4, signed=False, symmetric=False, power=2.4, candidates=10, weights=weights
    )
    assert torch.equal(record.tensors[f"{LAYER}|scale"], scale)


def test_groups_of_several_steps_cover_all_of_them(tiny_pipeline):
    scene = build(tiny_pipeline(), grouping=2)
    plain = RangeSearch(values=64, weight_candidates=1, input_candidates=1)
    record = scale_inputs(scene.unet, scene.ranges, plain)
    caught = inputs_of(scene, LAYER)
    for group, steps in ((1, caught[:2]), (0, caught[2:])):
        spread = max(0.0, *(float(x.max()) for x in steps)) - min(0.0, *(float(x.min()) for x in steps))
        assert float(record.tensors[f"{LAYER}|input|scale"][group]) == pytest.approx(spread / 15, rel=1e-6)


def test_selection_follows_the_sign_of_r_and_states_true_errors(scene):
    record = select(scene.unet, scene.ranges, Daq(criterion="likelihood"), SEARCH)
    assert set(record.meta["choices"]) == {n for n, _ in quantized_layers(scene.unet) if n.endswith(".mix")}
    for name, rows in record.meta["choices"].items():
        assert [row["group"] for row in rows] == list(range(scene.groups.count))
        for row in rows:
            assert row["use_log2"] == (row["ratio"] > 0)
            assert bool(record.tensors[f"{name}|use_log2"][row["group"]]) == row["use_log2"]
            assert 0 <= row["error_even"] < math.inf
            assert 0 <= row["error_log2"] < math.inf


def test_min_max_covers_every_probability(scene):
    plain = RangeSearch(values=64, weight_candidates=1, input_candidates=1)
    record, name = select(scene.unet, scene.ranges, Daq(), plain), "mid_block.attentions.0.mix"
    for step, p in enumerate(inputs_of(scene, name)):
        group = len(scene.trajectories.timesteps) - 1 - step
        largest = float(p.max())
        assert float(record.tensors[f"{name}|peak"][group]) == pytest.approx(largest, rel=1e-6)
        assert float(record.tensors[f"{name}|scale"][group]) == pytest.approx(largest / 15, rel=1e-6)
    sampled = scene.ranges.tensors[f"{name}|left|rows"].flatten(1).amax(1)
    assert bool((sampled < scene.ranges.tensors[f"{name}|left|high"].flatten()).any())  # a sample alone would miss some


def test_selection_by_error_takes_the_smaller_one(scene):
    record = select(scene.unet, scene.ranges, Daq(criterion="error"), SEARCH)
    rows = [row for of_layer in record.meta["choices"].values() for row in of_layer]
    assert all(row["use_log2"] == (row["error_log2"] < row["error_even"]) for row in rows)


def test_float_mode_survives_calibration(ready, tiny_pipeline):
    original = tiny_pipeline().unet
    x, t = ready.trajectories.samples[1], ready.trajectories.timesteps[1]
    with floating(ready.unet), torch.no_grad():
        assert torch.equal(ready.unet(x, t).sample, original(x, t).sample)
