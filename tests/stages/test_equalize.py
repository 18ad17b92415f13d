"""The strength of TCR that a layer chooses, against the noise that each strength really leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.modes import Mode, running
from tcaq.numerics.affine import qparams
from tcaq.numerics.equalize import tcr_vector
from tcaq.quantizers.clock import StepClock
from tcaq.records import Record
from tcaq.spec.grid import AffineGrid, TokenGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.recipe import Tcr
from tcaq.spec.steps import StepGroups
from tcaq.stages.equalize import STRENGTHS, chosen_vector, layer_noise
from tcaq.stages.observe import channel_maxima

CHANNELS, TOKENS, SAMPLED = 96, 2048, 32
SPEC = Tcr(linear_strength="layer", percentile=0.0)


def made(weight_bits: int, input_bits: int) -> QuantizedLinear:
    grids = LayerGrids(
        name="layer", kind="linear", weight=AffineGrid(bits=weight_bits), inputs=(TokenGrid(bits=input_bits),)
    )
    return QuantizedLinear.wrap(nn.Linear(CHANNELS, 64), grids, StepClock(StepGroups()))


def tokens(sizes: float) -> list[torch.Tensor]:
    """Inputs of two steps, float [tokens, channels]; tokens differ in size among themselves, and channels among themselves."""
    spread = torch.logspace(-1, 1, CHANNELS)[torch.randperm(CHANNELS)]
    return [
        step * torch.randn(TOKENS, CHANNELS) * spread * torch.randn(TOKENS, 1).mul(sizes).exp() for step in (0.5, 2.0)
    ]


def observed(steps: list[torch.Tensor]) -> Record:
    tables = {
        "low": [x.amin(0) for x in steps],
        "high": [x.amax(0) for x in steps],
        "square": [x.square().mean(0) for x in steps],
        "rows": [x[:SAMPLED] for x in steps],
    }
    return Record({f"layer|input|{name}": torch.stack(rows) for name, rows in tables.items()})


@torch.no_grad()
def measured(layer: QuantizedLinear, steps: list[torch.Tensor], vector: torch.Tensor) -> float:
    """The mean square error of the layer's outputs with a vector, summed over channels."""
    layer.equalizer.copy_(vector)
    weight, bits = layer.equalized_weight(), layer.weight_quantizer.grid.bits
    layer.weight_quantizer.set_rows(*qparams(weight.amin(1), weight.amax(1), bits, False, False), weight)
    errors = []
    for x in steps:
        with running(layer, Mode.FLOAT):
            real = layer(x)
        errors.append((layer(x) - real).square().mean(0).sum())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("sizes", [0.0, 0.7])
def test_grids_for_each_token_get_a_strength_near_the_best(bits: tuple[int, int], sizes: float) -> None:
    torch.manual_seed(0)
    layer, steps = made(*bits), tokens(sizes)
    ranges = observed(steps)
    noise = {}
    for strength in STRENGTHS:
        vector = tcr_vector(
            channel_maxima(ranges, "layer"), percentile=SPEC.percentile, truncate=SPEC.truncate, strength=strength
        )
        noise[strength] = measured(layer, steps, vector)
        assert layer_noise("layer", layer, ranges, vector) == pytest.approx(noise[strength], rel=0.2)
    assert measured(layer, steps, chosen_vector("layer", layer, ranges, SPEC)) < 1.05 * min(noise.values())
