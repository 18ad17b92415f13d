"""Steps of learning that are recorded and replayed: the same numbers as plain steps, and nothing read on the host."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from tcaq.models.denoiser import clock_of
from tcaq.models.units import Unit
from tcaq.records import Record
from tcaq.spec.recipe import Reconstruction
from tcaq.stages import learn as learning
from tcaq.stages.graphs import DeviceCosine, RecordedStep
from tcaq.stages.learn import Fit
from tcaq.stages.reconstruct import Reconstructor, apply_unit, unit_state

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to record on")
CPU = torch.device("cpu")


class Notebook:
    """Records by remembering what to call; counts what was done."""

    def __init__(self, problem: str | None = None) -> None:
        self.plain = self.recorded = self.replayed = 0
        self.problem = problem

    def plainly(self, launch):
        self.plain += 1
        launch()

    def captured(self, launch):
        if self.problem is not None:
            raise RuntimeError(self.problem)
        self.recorded += 1

        def replay():
            self.replayed += 1
            launch()

        return replay


def test_each_form_is_run_plainly_then_recorded_once_and_replayed_on_the_same_memory():
    notebook, seen, places = Notebook(), [], set()

    def step(number, penalized, rows, beta):
        seen.append((number, penalized, rows.tolist(), float(beta)))
        places.add((number, penalized, rows.data_ptr(), beta.data_ptr()))

    recorded = RecordedStep(step, notebook, CPU)
    given = [(i % 2, i > 9, [i, i + 1], float(i)) for i in range(30)]
    for number, penalized, rows, beta in given:
        recorded((number, penalized), torch.tensor(rows), beta)
    assert seen == given
    forms = len({(number, penalized) for number, penalized, *_ in given})
    assert len(places) == forms == notebook.recorded == 4
    assert notebook.plain == forms * RecordedStep.PLAIN
    assert notebook.replayed == len(given) - notebook.plain


def test_a_step_that_cannot_be_recorded_goes_on_plainly_with_one_warning():
    seen = []
    recorded = RecordedStep(lambda number, x: seen.append(float(x)), Notebook("a value was read\nmore"), CPU)
    with pytest.warns(RuntimeWarning, match="cannot be recorded.*a value was read$") as caught:
        repeat(recorded, 8)
    assert seen == [1.0] * 8
    assert len(caught) == 1


def test_rates_on_a_device_are_those_of_the_scheduler():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.03, 1e-5)]
    ours, theirs = (torch.optim.SGD(copy.deepcopy(groups)) for _ in range(2))
    cosine = DeviceCosine(ours, 50, CPU)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 50)
    for _ in range(50):
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert float(mine["lr"]) == pytest.approx(other["lr"], rel=1e-5, abs=1e-9)
        cosine.step()
        theirs.step()
        schedule.step()


def repeat(recorded, times):
    """The same step a number of times."""
    for _ in range(times):
        recorded((0,), 1.0)


def fitted(scene, unit, how, patches, monkeypatch):
    """The unit's state after a fit, with what is patched; its state before is put back."""
    before = Record({key: value.clone() for key, value in unit_state(unit).items()})
    with monkeypatch.context() as patched:
        for name, value in patches.items():
            patched.setattr(learning, name, value)
        units = scene.units if unit in scene.units else [unit]
        with Reconstructor(scene.unet, units, scene.trajectories, how, memory=1.0) as reconstructor:
            record = reconstructor.fit(unit.name)
    apply_unit(unit, before)
    return record


def on_tensors(groups, iterations, device):
    """What a recorded step has on a GPU: rates in tensors."""
    optimizer = torch.optim.Adam(groups, fused=True)
    return optimizer, DeviceCosine(optimizer, iterations, device)


@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "network"])
def test_learning_by_recorded_steps_is_learning(ready, name, monkeypatch):
    whole = Unit("network", ready.unet)
    unit = next((unit for unit in ready.units if unit.name == name), whole)
    spec = Reconstruction(iterations=30, batch=4, inputs=12, bias_rate=1e-2, drop=0.5 if unit is not whole else 0.0)
    notebook = Notebook()

    class Device:
        """The CPU, taken for a GPU."""

        type = "cuda"

    patches = {
        "optimizing": lambda groups, iterations, _: on_tensors(groups, iterations, CPU),
        "CudaRecorder": lambda *_: notebook,
        "RecordedStep": lambda step, recorder, _: RecordedStep(step, recorder, CPU),
        "device_of": lambda _: Device(),
        "following": lambda generator, _: generator,
    }
    how = Fit(spec, spec.iterations, trust=0.8 if unit is whole else 0.0)
    recorded = fitted(ready, unit, how, patches, monkeypatch)
    assert notebook.replayed > 15
    plain = fitted(ready, unit, how, patches | {"RecordedStep": plain_steps}, monkeypatch)
    assert all(torch.equal(recorded.tensors[key], value) for key, value in plain.tensors.items())
    usual = fitted(ready, unit, how, {}, monkeypatch)  # Adam's arithmetic in another order
    assert recorded.meta["loss_before"] == usual.meta["loss_before"]
    assert recorded.meta["loss_after"] == pytest.approx(usual.meta["loss_after"], rel=0.05)


@GPU
@pytest.mark.parametrize("name", ["down_blocks.0.resnets.0", "mid_block.attentions.0", "network"])
def test_a_gpu_replays_what_it_would_compute(ready, name, monkeypatch):
    ready.unet.to("cuda")
    unit = next((unit for unit in ready.units if unit.name == name), Unit("network", ready.unet))
    spec = Reconstruction(iterations=40, batch=4, inputs=12, bias_rate=1e-2)
    how = Fit(spec, spec.iterations)
    launches = fitted(ready, unit, how, {"RecordedStep": plain_steps}, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replays = fitted(ready, unit, how, {}, monkeypatch)
    assert replays.meta["loss_after"] == pytest.approx(launches.meta["loss_after"], rel=0.05)
    assert replays.meta["loss_after"] < replays.meta["loss_before"]
    assert clock_of(ready.unet).group.is_cuda


def plain_steps(step, recorder, device):
    """A step that is never recorded."""
    return lambda form, rows, beta: step(*form, rows, torch.as_tensor(beta, device=rows.device))


@GPU
def test_a_gpu_says_that_a_step_read_a_value_and_goes_on():
    total = torch.zeros((), device="cuda")
    recorder = learning.CudaRecorder(torch.device("cuda"), torch.Generator("cuda"))

    def step(number, x):
        if float(x) > 0:
            total.add_(x)

    recorded = RecordedStep(step, recorder, torch.device("cuda"))
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        repeat(recorded, 8)
    assert float(total) == 8.0
    repeat(RecordedStep(lambda number, x: total.add_(x), recorder, torch.device("cuda")), 8)  # which is recorded
    assert float(total) == 16.0


@GPU
def test_a_gpu_draws_new_numbers_in_every_replay():
    device, drawn = torch.device("cuda"), torch.zeros(4, device="cuda")
    generator, same = (torch.Generator("cuda").manual_seed(3) for _ in range(2))
    recorded = RecordedStep(
        lambda _, x: drawn.copy_(torch.rand(4, generator=generator, device=device) * x),
        learning.CudaRecorder(device, generator), device,
    )  # fmt: skip
    for _ in range(8):
        recorded((0,), 1.0)
        assert torch.equal(drawn, torch.rand(4, generator=same, device=device))
