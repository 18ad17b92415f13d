"""Quantizing where the model is: every recipe on a device that shares no tensor with the CPU, and with the same outcome."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tcaq
from tcaq.recipes.quantize import quantize
from tcaq.recipes.registry import RECIPES
from tcaq.runs import Run
from tests.elsewhere import elsewhere

from .test_related import SMALL, small

NO_DROP = {"reconstruction": {**SMALL["reconstruction"], "drop": 0.0}}
"""Which inputs come from the float stream is drawn on the device, so there it is not the same."""


def recipe_of(program):
    made = small(program)
    return made if made.reconstruction is None else made.changed(NO_DROP)


@pytest.mark.parametrize("program", RECIPES)
def test_every_record_is_the_same_to_the_bit(tiny_pipeline, tmp_path, monkeypatch, program):
    recipe = recipe_of(program)
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention adds in another order
        quantize(tiny_pipeline(), recipe, tmp_path / "cpu")
    with sdpa_kernel(SDPBackend.MATH), elsewhere(monkeypatch) as device:
        pipe = quantize(tiny_pipeline().to(device), recipe, tmp_path / "device")
        assert {tensor.device for tensor in pipe.unet.state_dict().values()} == {device}
    ours, others = (Run.read(tmp_path / name / "run") for name in ("cpu", "device"))
    assert ours.finished() == others.finished()
    for name in ours.finished():
        for (item, here), (_, there) in zip(ours.results(name), others.results(name), strict=True):
            assert here.tensors.keys() == there.tensors.keys()
            for key, value in here.tensors.items():
                torch.testing.assert_close(there.tensors[key], value, rtol=0, atol=0, msg=f"{name} {item} {key}")
    here, there = (tcaq.load(tmp_path / name).unet.state_dict() for name in ("cpu", "device"))
    assert here.keys() == there.keys()
    assert all(torch.equal(value, there[key]) for key, value in here.items())
