"""Reconstruction of blocks with two outputs, of layers used twice, and in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcaq.layers.insert import insert
from tcaq.layers.modes import Mode, running
from tcaq.models import architectures
from tcaq.models.architectures import Architecture
from tcaq.models.denoiser import attach_clock
from tcaq.models.inputs import Inputs
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import default_plan, execution_order, resolve
from tcaq.spec.recipe import RangeSearch, Reconstruction
from tcaq.spec.steps import StepGroups
from tcaq.stages.cache import ActivationCache
from tcaq.stages.draw import draw_parts
from tcaq.stages.learn import Fit
from tcaq.stages.observe import observe
from tcaq.stages.precise import precise
from tcaq.stages.reconstruct import Reconstructor, apply_unit
from tcaq.stages.replay import Replay
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights

SEARCH = RangeSearch(values=400, weight_candidates=1, input_candidates=1)


class Block(nn.Module):
    """Two streams, of which the last block drops one; `turns` has no row for each sample, though it may have as many rows."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.own, self.other, self.last = nn.Linear(6, 6), nn.Linear(6, 6), last

    def forward(self, image, text, turns=None):
        image, text = image + self.own(image * turns[0][:, None]) + text.mean(1, keepdim=True), text + self.other(text)
        return (None if self.last else text), image


class TwoStreams(nn.Module):
    """Blocks of two streams behind an embedding that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Block(False), Block(True)])

    def forward(self, hidden_states, timestep, text, turns):
        image, text = self.embed(hidden_states), self.embed(text)
        for block in self.blocks:
            text, image = block(image, text=text, turns=(turns, 2))
        return (image * (1 + timestep.reshape(-1, 1, 1) / 1000).to(image.dtype),)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def scene(request, monkeypatch):
    row = Architecture(units=("Block",), shared=("turns",))
    monkeypatch.setitem(architectures.ARCHITECTURES, "TwoStreams", row)
    torch.manual_seed(0)
    model = TwoStreams().to(request.param).eval()
    calls = [
        Inputs(torch.randn(4, 4, 6).to(request.param), torch.full((4,), t), {"text": torch.randn(4, 3, 6).to(request.param)},
               {"turns": torch.linspace(1, 2, 4).to(request.param)})
        for t in (900.0, 100.0)
    ]  # fmt: skip
    trajectories = Trajectories.recorded(calls)
    insert(model, resolve(model, default_plan(model, 4, 4)), attach_clock(model, StepGroups(boundaries=(500.0,))))
    with torch.no_grad():
        units = execution_order(model, lambda: calls[0](model))
    ranges = observe(model, trajectories, SEARCH.values, 32, 0)
    apply_weight_scales(model, scale_weights(model, ranges, SEARCH))
    apply_input_scales(model, scale_inputs(model, ranges, SEARCH))
    return model, units, trajectories


@pytest.mark.parametrize("mode", [Mode.FLOAT, Mode.FAKE])
@pytest.mark.parametrize("budget", [0, 2**20])
def test_replayed_calls_are_those_of_a_whole_pass(scene, mode, budget):
    model, units, trajectories = scene
    assert [unit.name for unit in units] == ["embed", "blocks.0", "blocks.1"]
    batches = draw_parts(trajectories, 8, 0)[0].split(4)
    with ActivationCache(budget) as cache:
        replay = Replay(model, units, batches, cache)
        for unit in units:
            seen = []
            handle = unit.module.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
            )
            with running(model, mode), torch.no_grad():
                for batch in batches:
                    batch(model)
            handle.remove()
            call = replay.inputs(unit, mode)
            firsts = seen[::2] if unit.name == "embed" else seen  # of its two uses the first is learned
            # what was spilled lies elsewhere in memory, where kernels may round differently
            torch.testing.assert_close(call.args[0], torch.cat([args[0] for args, _ in firsts]))
            if unit.name != "embed":
                torch.testing.assert_close(call.kwargs["text"], torch.cat([kwargs["text"] for _, kwargs in seen]))
                assert torch.equal(
                    call.kwargs["turns"][0], seen[0][1]["turns"][0]
                )  # as long as a batch, and still not of its rows
                assert call.rows == {"0", "text"}


def test_fits_lower_both_outputs_and_leave_the_dtype(scene):
    model, units, trajectories = scene
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    spec = Reconstruction(iterations=60, batch=4, inputs=8, drop=0.0)
    with Reconstructor(model, units, trajectories, Fit(spec, 60), memory=1.0) as reconstructor:
        for unit in units[:2]:
            apply_unit(unit, reconstructor.fit(unit.name))
        teaching, last = (reconstructor._lessons(unit).parts[0] for unit in units[1:])
        fitted = reconstructor.fit("blocks.0")
    assert len(teaching.targets) == 2
    assert all(target.dtype == torch.float32 for target in teaching.targets)
    assert len(last.targets) == 1
    assert fitted.meta["loss_after"] <= 1.02 * fitted.meta["loss_before"]
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


def test_precise_gives_back_what_it_took_even_after_an_error():
    layer = nn.Linear(3, 3).to(torch.float16)
    before = layer.weight.detach().clone()

    def spoil() -> None:
        with precise(layer):
            assert layer.weight.dtype == torch.float32
            layer.weight.data.add_(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        spoil()
    assert torch.equal(layer.weight, before)
