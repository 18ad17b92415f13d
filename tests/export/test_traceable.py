"""What is traced, run in PyTorch: the arithmetic that formats are given must be that of the fake model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcaq.errors import ModelError
from tcaq.export.openvino import OpenVinoDialect
from tcaq.export.powers import is_coarse
from tcaq.export.probability import CoarseStandIn, ProbabilityStandIn, probability_stand_in
from tcaq.export.standin import Steps
from tcaq.export.traceable import Traceable, stand_in
from tcaq.models.bypass import attach_bypass
from tcaq.models.correction import attach_correction
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.mixed import probability_quantizer, set_widths
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Log2Grid, UnitGrid
from tcaq.spec.steps import StepGroups
from tests.integer.test_layers import bound, quantized, spread_widths

TIMES = (0.0, 333.0, 334.0, 600.0, 999.0)


@torch.no_grad()
@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("bits", [(2, 8), (4, 4), (7, 8), (8, 8)], ids=str)
@pytest.mark.parametrize(
    "plain",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3, padding=2, dilation=2),
        nn.Linear(6, 8),
    ],
)
def test_a_layer_equals_its_fake_one(plain: nn.Module, bits: tuple[int, int], vnni: bool) -> None:
    torch.manual_seed(0)
    layer = quantized(plain, AffineGrid(bits=bits[0]), AffineGrid(bits=bits[1]))
    x = torch.randn(3, 6, 9, 10) if isinstance(plain, nn.Conv2d) else torch.randn(3, 5, 6)
    steps = Steps(layer.input_quantizer.clock.boundaries)
    traced = stand_in(layer, OpenVinoDialect(vnni), steps)
    for time in (10.0, 500.0, 900.0):
        layer.input_quantizer.clock.set(time)
        steps.set(torch.tensor([time]))
        assert (
            (traced(x) - layer(x)).abs() <= bound(layer, x) * 10
        ).all()  # the zero point's share cancels in float, not before
    largest = 2 * (2 ** bits[1] - 1) * int(traced.rows.weight.abs().max())
    assert vnni or largest < 2**15  # what processors without VNNI add exactly


@torch.no_grad()
@pytest.mark.parametrize("plain", [nn.Conv2d(6, 8, 3, padding=1), nn.Linear(6, 8)], ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_rows_of_different_widths_equal_their_fake_ones(plain: nn.Module, signed: bool) -> None:
    torch.manual_seed(0)
    inputs = AffineGrid(bits=3, wider=(8,), signed=signed)
    layer = quantized(plain, AffineGrid(bits=4), inputs)
    spread_widths(layer, inputs)
    steps = Steps(layer.input_quantizer.clock.boundaries)
    traced = stand_in(layer, OpenVinoDialect(), steps)
    x = torch.randn(3, 6, 9, 10) if isinstance(plain, nn.Conv2d) else torch.randn(3, 5, 6)
    for time in (10.0, 900.0):
        layer.input_quantizer.clock.set(time)
        steps.set(torch.tensor([time]))
        assert ((traced(x) - layer(x)).abs() <= bound(layer, x) * 10).all()


@torch.no_grad()
def test_probabilities_of_different_widths_fall_on_the_same_grid() -> None:
    draw = torch.Generator().manual_seed(0)
    for chosen in ((True, False), (True, True), (False, False)):
        grid = AdaptiveGrid(bits=4, wider=(8,), per_octave=2)
        quantizer = probability_quantizer(grid, StepClock(StepGroups(boundaries=(500.0,))))
        set_widths(quantizer, torch.tensor([8, 4]))
        quantizer.set_rows(torch.tensor([0.004, 0.06]), torch.tensor([0.9, 0.7]), torch.tensor(chosen))
        traced = probability_stand_in(quantizer, Steps(quantizer.clock.boundaries))
        p = torch.rand(2, 3, 8, 8, generator=draw) ** 4
        p[0, 0, 0, 0] = 0.0
        for time in (0.0, 900.0):
            quantizer.clock.set(time)
            traced.steps[0].set(torch.tensor([time]))
            torch.testing.assert_close(traced(p), quantizer(p), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_probabilities_fall_on_the_same_grid() -> None:
    steps, draw = StepGroups(boundaries=(500.0,)), torch.Generator().manual_seed(0)
    for chosen in ((True, False), (True, True), (False, False)):
        quantizer = ProbabilityQuantizer(AdaptiveGrid(bits=4, per_octave=2), StepClock(steps))
        quantizer.set_rows(torch.tensor([0.05, 0.06]), torch.tensor([0.9, 0.7]), torch.tensor(chosen))
        traced = ProbabilityStandIn(quantizer, Steps(quantizer.clock.boundaries))
        p = torch.rand(2, 3, 8, 8, generator=draw) ** 4
        p[0, 0, 0, 0] = 0.0
        for time in (0.0, 900.0):
            quantizer.clock.set(time)
            traced.steps[0].set(torch.tensor([time]))
            torch.testing.assert_close(traced(p), quantizer(p), rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [(True, True), (True, False)], ids=["log2", "both"])
@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_coarse_probabilities_need_no_logarithm(bits, per_octave, chosen) -> None:
    steps, draw = StepGroups(boundaries=(500.0,)), torch.Generator().manual_seed(0)
    quantizer = ProbabilityQuantizer(AdaptiveGrid(bits=bits, per_octave=per_octave), StepClock(steps))
    quantizer.set_rows(torch.tensor([0.05, 0.06]), torch.tensor([0.9, 0.37]), torch.tensor(chosen))
    group = Steps(quantizer.clock.boundaries)
    traced = probability_stand_in(quantizer, group)
    assert isinstance(traced, CoarseStandIn)
    p = torch.rand(2, 3, 50, 40, generator=draw) ** torch.randint(1, 20, (2, 3, 50, 40), generator=draw)
    p[0, 0, 0, 0] = 0.0
    for time in (0.0, 900.0):
        quantizer.clock.set(time)
        group.set(torch.tensor([time]))
        torch.testing.assert_close(traced(p), quantizer(p), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("grid", "coarse"),
    [
        (AdaptiveGrid(bits=4, per_octave=2), True),
        (Log2Grid(bits=3), True),
        (AdaptiveGrid(bits=4, per_octave=4), False),
        (AdaptiveGrid(bits=5), False),
        (AdaptiveGrid(bits=4, wider=(8,)), False),
        (UnitGrid(bits=4), False),
    ],
    ids=str,
)
def test_which_grids_are_coarse(grid, coarse) -> None:
    quantizer = probability_quantizer(grid, StepClock(StepGroups(boundaries=(500.0,))))
    quantizer.use_log2[1] = not isinstance(grid, UnitGrid)
    assert is_coarse(quantizer) is coarse
    quantizer.use_log2.zero_()
    assert not is_coarse(quantizer)


@torch.no_grad()
def test_a_denoiser_predicts_what_the_fake_one_does(tiny_pipeline, quantized_tiny) -> None:
    unet = quantized_tiny(tiny_pipeline(), weights=8).unet
    attach_correction(unet, 1).set_rows(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([[1.0], [2.0], [3.0]]))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    traced = Traceable(unet, OpenVinoDialect())
    for time in TIMES:
        x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(int(time)))
        difference = (traced(x, torch.tensor([time])) - unet(x, time).sample).abs()
        assert difference.median() < 0.1  # codes that tip over; another step group's correction alone would be 0.5
        assert difference.max() < 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


@torch.no_grad()
def test_what_goes_around_the_denoiser_is_traced(tiny_pipeline, quantized_tiny) -> None:
    unet = quantized_tiny(tiny_pipeline(), weights=8).unet
    bypass, limit, gain = attach_bypass(unet), torch.full((3,), 0.5), torch.tensor([1.0, 2.0, 3.0])
    bypass.set_rows(-limit, limit, gain)
    whole = Traceable(unet, OpenVinoDialect())
    bypass.gain.zero_()
    inner = Traceable(unet, OpenVinoDialect())
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for group, time in enumerate((10.0, 500.0, 900.0)):
        around = whole(x, torch.tensor([time])) - inner(x, torch.tensor([time]))
        torch.testing.assert_close(around, gain[group] * (x - x.clamp(-0.5, 0.5)), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_listed(tiny_pipeline, quantized_tiny) -> None:
    with pytest.raises(ModelError, match="not quantized, or was lowered"):
        Traceable(tiny_pipeline().unet, OpenVinoDialect())
    unet = quantized_tiny(tiny_pipeline()).unet
    unet.conv_in.padding_mode = "reflect"
    unet.conv_out.groups = 2
    with pytest.raises(ModelError, match=r"conv_in: padding \(1, 1\) with reflect.*conv_out: it has 2 groups"):
        Traceable(unet, OpenVinoDialect())
    with pytest.raises(ModelError, match="not quantized"):
        Traceable(nn.Linear(2, 2), OpenVinoDialect())
