"""Replayed passes against plain ones; a fit must lower its loss and come back bit for bit."""

from __future__ import annotations

import pytest
import torch

from tcaq.errors import RunError
from tcaq.layers.modes import Mode, running
from tcaq.models.denoiser import clock_of
from tcaq.models.units import Unit
from tcaq.records import Record
from tcaq.spec.recipe import Reconstruction
from tcaq.stages.cache import ActivationCache
from tcaq.stages.call import rows_of
from tcaq.stages.draw import draw_parts
from tcaq.stages.learn import Fit, Objective, annealed, batch_loss
from tcaq.stages.reconstruct import (
    Reconstructor,
    apply_unit,
    measure,
    quantized_outputs,
    unit_state,
)
from tcaq.stages.replay import Replay

SPEC = Reconstruction(iterations=30, batch=4, inputs=12)


def make(scene, memory=1.0, **changes):
    spec = SPEC.model_copy(update=changes)
    return Reconstructor(scene.unet, scene.units, scene.trajectories, Fit(spec, spec.iterations), memory=memory)


@pytest.mark.parametrize("mode", [Mode.FLOAT, Mode.FAKE])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_replayed_inputs_equal_those_of_a_whole_pass(ready, mode, budget, tmp_path):
    batches = draw_parts(ready.trajectories, 8, 0)[0].split(4)
    with ActivationCache(budget, tmp_path) as cache:
        replay = Replay(ready.unet, ready.units, batches, cache)
        for unit in ready.units[::3]:
            expected = []
            handle = unit.module.register_forward_pre_hook(
                lambda _, args, kwargs, seen=expected: seen.append((args, kwargs)), with_kwargs=True
            )
            # convolutions round differently for other strides, so units hand on contiguous outputs here as they do there
            layout = [u.module.register_forward_hook(lambda *a: a[-1].contiguous()) for u in ready.units]
            with running(ready.unet, mode), torch.no_grad():
                for batch in batches:
                    batch(ready.unet)
            for added in (handle, *layout):
                added.remove()
            call = replay.inputs(unit, mode)
            for i, value in enumerate(call.args):
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, torch.cat([args[i] for args, _ in expected])), unit.name
    assert not list(tmp_path.iterdir())  # what was spilled is gone


def test_passed_units_are_not_run_again(ready):
    inputs = draw_parts(ready.trajectories, 4, 0)[0]
    runs = {unit.name: 0 for unit in ready.units}
    with ActivationCache(2**30) as cache:
        replay = Replay(ready.unet, ready.units, [inputs], cache)
        for unit in ready.units[:-1]:
            replay.inputs(unit, Mode.FAKE)
        first = ready.units[0].module
        handle = first.input_quantizer.register_forward_hook(lambda *_: runs.update({"first": 1}))
        replay.inputs(ready.units[-1], Mode.FAKE)
        handle.remove()
    assert "first" not in runs


def test_inputs_are_drawn_evenly_over_steps(ready):
    steps, images = ready.trajectories.samples.shape[:2]
    timesteps = draw_parts(ready.trajectories, steps * 3, 0)[0].timestep
    assert timesteps.unique(return_counts=True)[1].tolist() == [3] * steps
    samples = draw_parts(ready.trajectories, 10**6, 0)[0][:].sample
    assert len(samples) == steps * images
    assert len(samples.flatten(1).unique(dim=0)) == steps * images


@pytest.mark.parametrize("schedule", ["joint", "two-phase"])
def test_fitting_lowers_the_loss_of_a_block(ready, schedule):
    with make(ready, iterations=60, schedule=schedule, drop=0.0) as reconstructor:
        for unit in ready.units[:3]:
            apply_unit(unit, reconstructor.fit(unit.name))
        record = reconstructor.fit("down_blocks.0.resnets.0")
    assert record.meta["loss_after"] < record.meta["loss_before"]


def test_a_fit_is_reproducible_and_comes_back_bit_for_bit(ready, tmp_path):
    unit = next(u for u in ready.units if u.name == "mid_block.attentions.0")
    start = Record(unit_state(unit))
    with make(ready) as reconstructor:
        first = reconstructor.fit(unit.name)
    after = unit_state(unit)
    assert any(not torch.equal(after[k], start.tensors[k]) for k in after)
    apply_unit(unit, start)
    assert all(torch.equal(v, start.tensors[k]) for k, v in unit_state(unit).items())
    with make(ready, memory=1e-9) as reconstructor:  # everything spilled: the same result
        second = reconstructor.fit(unit.name)
    assert all(torch.equal(second.tensors[k], v) for k, v in first.tensors.items())
    first.save(tmp_path / "unit.safetensors")
    apply_unit(unit, start)
    apply_unit(unit, Record.load(tmp_path / "unit.safetensors"))
    assert all(torch.equal(v, after[k]) for k, v in unit_state(unit).items())


def test_correcting_biases_undoes_a_planted_shift(ready):
    unit = next(u for u in ready.units if u.name == "conv_in")
    layer, spec = unit.module, {"drop": 0.0, "rounding_rate": 0.0, "scale_rate": 0.0}
    with make(ready, **spec) as reconstructor:
        least = reconstructor.fit(unit.name).meta["loss_before"]  # that of quantization alone
        assert reconstructor.fit(unit.name).meta["loss_after"] == least  # every rate is zero
        planted = 5 * layer.output_step() * torch.linspace(-1, 1, len(layer.bias))
        layer.bias_correction = planted.clone()
    with make(ready, **spec, bias_rate=0.1, iterations=200) as reconstructor:
        fitted = reconstructor.fit(unit.name)
    assert fitted.meta["loss_before"] > 10 * least
    assert fitted.meta["loss_after"] < 1.1 * least
    assert float(layer.bias_correction.abs().max()) < 0.2 * float(planted.abs().max())
    with running(ready.unet, Mode.FLOAT):  # the teacher knows nothing of it
        assert torch.equal(
            layer(ready.trajectories.samples[0]), torch.nn.Conv2d.forward(layer, ready.trajectories.samples[0])
        )


@pytest.mark.parametrize("balance", ["all", "steps"])
def test_every_step_group_starts_from_a_loss_of_one_when_steps_are_balanced(ready, balance):
    unit = next(u for u in ready.units if u.name == "up_blocks.1.resnets.0")
    with make(ready, balance=balance) as reconstructor:
        lessons = reconstructor._lessons(unit)
        (teaching,) = lessons.parts
        _, (divisors,) = measure(unit, lessons, clock_of(ready.unet), reconstructor.how.spec)
    errors = []
    for row, t in enumerate(teaching.timesteps):
        clock_of(ready.unet).set(t)
        one = torch.tensor([row])
        with torch.no_grad():
            (output,) = rows_of(teaching.inputs, one)(unit.module)
        errors.append((output - teaching.targets[0][one]).square().sum(1).mean())
    relative = torch.stack(errors) / divisors[:, 0]
    assert float(relative.mean()) == pytest.approx(1.0, rel=1e-4)
    means = [float(relative[teaching.timesteps == t].mean()) for t in teaching.timesteps.unique()]
    assert len(means) == 4
    assert (means == pytest.approx([1.0] * 4, rel=1e-4)) is (balance == "steps")


def test_every_band_of_every_step_group_starts_from_a_loss_of_one(ready):
    unit = next(u for u in ready.units if u.name == "up_blocks.1.resnets.0")
    with make(ready, balance="bands") as reconstructor:
        lessons = reconstructor._lessons(unit)
        (teaching,), spec = lessons.parts, reconstructor.how.spec
        _, (divisors,) = measure(unit, lessons, clock_of(ready.unet), spec)
        found = [
            teaching.distance(outputs, rows, spec.power, in_bands=True) / divisors[rows]
            for outputs, _, rows in quantized_outputs(unit, lessons, clock_of(ready.unet), spec.batch)
        ]
        fitted = reconstructor.fit(unit.name)
    relative = torch.cat(found)
    for t in teaching.timesteps.unique():
        assert relative[teaching.timesteps == t].mean(dim=0).tolist() == pytest.approx(
            [1.0] * relative.shape[1], rel=1e-4
        )
    assert relative.shape[1] > 1
    assert fitted.meta["loss_after"] < fitted.meta["loss_before"]


def test_the_whole_denoiser_is_a_unit_too(ready):
    whole = Unit("network", ready.unet)
    before = unit_state(whole)
    spec = SPEC.model_copy(update={"drop": 0.0, "bias_rate": 0.01})
    with Reconstructor(ready.unet, [whole], ready.trajectories, Fit(spec, 60, trust=0.8), memory=1.0) as reconstructor:
        fitted = reconstructor.fit("network")
    assert fitted.meta["loss_after"] < 0.95 * fitted.meta["loss_before"]
    after = unit_state(whole)
    apply_unit(whole, Record(before))
    assert unit_state(whole).keys() == before.keys()  # no correction is left where there was none
    apply_unit(whole, fitted)
    assert all(torch.equal(value, after[name]) for name, value in unit_state(whole).items())


def test_no_gradient_reaches_the_original_weights(ready):
    with make(ready) as reconstructor:
        reconstructor.fit("mid_block.resnets.0")
    assert all(p.grad is None for p in ready.unet.parameters())
    assert all(p.requires_grad for p in ready.unet.parameters())


def test_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tcaq.stages.cache.save_file", full)
    with ActivationCache(0, tmp_path) as cache, pytest.raises(RunError, match=r"cannot spill 40 bytes.*memory budget"):
        cache.put(("fake", "unit", 0), torch.zeros(10))


def test_beta_waits_then_falls():
    assert annealed(19, 100, 0.2) is None
    assert annealed(20, 100, 0.2) == 20.0
    assert annealed(60, 100, 0.2) == pytest.approx(11.0)
    assert annealed(100, 100, 0.2) == 2.0


def test_a_part_of_the_loss_is_what_stretches_of_steps_come_to(ready):
    """Against one row after another in float64: every row's own error, and that of the mean over each stretch."""
    unit = next(u for u in ready.units if u.name == "up_blocks.1.resnets.0")
    with make(ready, stretch=2, batch=6, inputs=12, drop=0.0, together=0.25) as reconstructor:
        lessons, how = reconstructor._lessons(unit), reconstructor.how
        clock, (teaching,) = clock_of(ready.unet), lessons.parts
        _, initial = measure(unit, lessons, clock, how.spec)
        number, rows = lessons.draw(how.spec.batch, torch.Generator().manual_seed(5))
        found = batch_loss(Objective(unit, lessons, clock, initial), number, rows, how.spec, torch.Generator())
        errors = []
        for row in rows[:, None]:
            clock.set(teaching.timesteps[row])
            with torch.no_grad():
                (output,) = rows_of(teaching.inputs, row)(unit.module)
            errors.append((output - teaching.targets[0][row])[0].double())
    steps = teaching.timesteps[rows].reshape(3, 2)
    assert (steps.diff(dim=1) < 0).all()  # a stretch goes on along its trajectory
    divisors = [float(value) for value in initial[0][rows]]
    own = sum(mean_power(e) / d for e, d in zip(errors, divisors, strict=True)) / 6
    pairs = zip(errors[::2], errors[1::2], divisors[::2], divisors[1::2], strict=True)
    common = sum(mean_power((a + b) / 2) / ((c + d) / 2) for a, b, c, d in pairs) / 3
    assert float(found.detach()) == pytest.approx(0.75 * own + 0.25 * common, rel=1e-4)


def mean_power(error):
    return float(error.square().sum(0).mean())


@pytest.mark.parametrize(("stretch", "batch", "length"), [(1, 4, 1), (3, 4, 3), (9, 2, 2), (4, 1, 1)])
def test_a_stretch_is_no_longer_than_a_batch(ready, stretch, batch, length):
    with make(ready, stretch=stretch, batch=batch) as reconstructor:
        lessons = reconstructor._lessons(ready.units[1])
    assert lessons.stretch == length
    assert len(lessons.draw(batch, torch.Generator())[1]) == batch // length * length
