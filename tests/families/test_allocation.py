"""Widths by layer in every family: all layers are reached, and what was chosen is what runs."""

from __future__ import annotations

import torch

import tcaq
from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import find_denoiser
from tcaq.runs import Run

from .test_lifecycle import EVERY, images_of, recipe
from .tiny import pipeline_of

CHOICE = {"bits": [2, 4, 8], "inputs": 8, "batch": 2}


@EVERY
def test_layers_trade_bits(name, tmp_path):
    spec = recipe(name, "mse", allocation=CHOICE, input_allocation=CHOICE)
    made = tcaq.quantize(pipeline_of(name), spec, tmp_path)
    layers = {n: m for n, m in quantized_layers(find_denoiser(made)[1]) if isinstance(m, QuantizedWeight)}
    for stage, part in (("allocate", "weight_quantizer"), ("allocate-inputs", "input_quantizer")):
        (record,) = (record for _, record in Run.read(tmp_path / "run").results(stage))
        assert bool((record.tensors["sensitivity"] >= 0).all())
        # a layer that predictions depend on costs something at two bits; a text that is all alike, for one, is exact on any grid
        assert int((record.tensors["sensitivity"][:, 0] > 0).sum()) > 0.8 * len(record.meta["layers"])
        for layer, bits in zip(record.meta["layers"], record.tensors["bits"].tolist(), strict=True):
            assert getattr(layers[layer], part).grid.bits == bits, layer
        assert len(record.tensors["bits"].unique()) > 1
    assert torch.equal(images_of(name, tcaq.load(tmp_path)), images_of(name, made))


def test_a_model_in_half_precision(tmp_path):
    pipe = pipeline_of("sd").to(torch.bfloat16)
    spec = recipe("sd", "mse", allocation=CHOICE, input_allocation=CHOICE)
    tcaq.quantize(pipe, spec, tmp_path)
    assert {"allocate", "allocate-inputs"} <= set(Run.read(tmp_path / "run").finished())
