"""Widths against denoisers whose noise is planted, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tcaq.errors import UsageError
from tcaq.layers.conv import QuantizedConv2d
from tcaq.models.denoiser import attach_clock
from tcaq.models.forward_process import ForwardProcess, forward_process
from tcaq.models.trajectories import Trajectories
from tcaq.numerics.affine import qparams
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.quantizers.mixed import row_widths, set_widths
from tcaq.records import Record
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.recipe import Mixed
from tcaq.spec.steps import StepGroups
from tcaq.stages.rows import ONE_ROW
from tcaq.stages.scale import operand_rows
from tcaq.stages.widths import measure_widths

STEPS = torch.tensor([900, 700, 500, 300, 100])
FLAT = ForwardProcess(torch.full((1000,), 0.5, dtype=torch.float64), "epsilon")
"""Signal and noise are equally strong at every step: the least ratio is 1."""


class Toy(nn.Module):
    """Predicts what one convolution that does nothing gives."""

    def __init__(self, groups: StepGroups, widths: tuple[int, ...]) -> None:
        super().__init__()
        clock = attach_clock(self, groups)
        inputs = AffineGrid(bits=widths[0], wider=widths[1:])
        plan = LayerGrids(name="conv", kind="conv", weight=AffineGrid(bits=8), inputs=(inputs,))
        plain = nn.Conv2d(2, 2, 1, bias=False)
        plain.weight.data.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        self.conv = QuantizedConv2d.wrap(plain, plan, clock)
        self.conv.weight_quantizer.set_rows(torch.full((2,), 1 / 255), torch.zeros(2), plain.weight)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample)


@dataclass
class Planted:
    """A toy whose grid spans so many standard deviations in each step group."""

    spans: Tensor
    groups: StepGroups
    widths: tuple[int, ...] = (4, 8)

    def measure(self, process: ForwardProcess = FLAT, **options: object):
        self.toy = Toy(self.groups, self.widths)
        noise = torch.randn(len(STEPS), 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
        spec = Mixed(bits=self.widths, **options)
        return measure_widths(self.toy, Trajectories(noise, STEPS), process, spec, 2, self._calibrate)

    def _calibrate(self) -> None:
        quantizer = self.toy.conv.input_quantizer
        (bits,) = row_widths(quantizer).unique().tolist()  # one width at a time is measured
        quantizer.set_rows(*qparams(-self.spans, self.spans, bits, signed=False, symmetric=False))


EACH = StepGroups.of("per-step", STEPS.tolist())
LOUD, QUIET = 100.0, 4.0


@pytest.mark.parametrize("loud", [(), (0,), (4,), (0, 1), (1, 3), (0, 1, 2, 3, 4)])
def test_the_wide_grid_runs_exactly_where_noise_was_planted(loud: tuple[int, ...]) -> None:
    spans = torch.full((5,), QUIET)
    spans[list(loud)] = LOUD  # groups ascend with t: 0 is the last step of sampling
    record = Planted(spans, EACH).measure()
    assert record.tensors["bits"].tolist() == [8 if group in loud else 4 for group in range(5)]
    assert record.meta == {"widths": [4, 8], "snr": "norms"}


def test_of_three_widths_each_step_has_the_narrowest_that_is_enough() -> None:
    record = Planted(torch.tensor([400.0, 50.0, QUIET, 50.0, 4000.0]), EACH, (3, 5, 8)).measure()
    assert record.tensors["bits"].tolist() == [8, 5, 3, 5, 8]  # at 4000 none is enough: the widest


def test_the_record_says_why() -> None:
    planted = Planted(torch.tensor([LOUD, QUIET, 9.0, 12.0, 20.0]), EACH)
    table = DDIMScheduler().alphas_cumprod.double()
    record = planted.measure(ForwardProcess(table, "epsilon"))
    forward, quantized = record.tensors["forward"], record.tensors["quantized"]
    for step, t in enumerate(STEPS.tolist()):
        assert float(forward[step]) == pytest.approx(float(table[t] / (1 - table[t])), rel=1e-9)
        group = len(STEPS) - 1 - step
        for row, bits in enumerate((4, 8)):
            step_size = 2 * float(planted.spans[group]) / (2**bits - 1)
            if step_size < 2:  # evenly spread errors of a step; wider steps than that leave the theory
                assert float(quantized[row, step]) == pytest.approx((12**0.5) / step_size, rel=0.15)
    powers = planted.measure(ForwardProcess(table, "epsilon"), snr="powers").tensors["quantized"]
    torch.testing.assert_close(powers, quantized.square())


def test_norms_ask_for_more_than_powers_where_the_signal_is_strong() -> None:
    strong = ForwardProcess(torch.full((1000,), 0.9, dtype=torch.float64), "epsilon")  # 9, between 3.5 and 3.5 ** 2
    planted = Planted(torch.full((5,), 7.5), EACH)
    assert planted.measure(strong).tensors["bits"].tolist() == [8] * 5
    assert planted.measure(strong, snr="powers").tensors["bits"].tolist() == [4] * 5


def test_a_group_has_what_its_most_demanding_step_needs() -> None:
    pair = StepGroups(boundaries=(200.0, 400.0, 800.0))  # 700 and 500 share a group
    rising = ForwardProcess(torch.where(torch.arange(1000) < 600, 0.95, 0.5).double(), "epsilon")
    record = Planted(torch.full((4,), 9.0), pair).measure(rising)
    assert record.tensors["bits"].tolist() == [8, 8, 8, 4]


def test_a_group_without_a_step_has_the_width_of_its_neighbour() -> None:
    groups = StepGroups(boundaries=(50.0, 200.0, 400.0, 600.0, 800.0, 950.0))
    spans = torch.tensor([LOUD, LOUD, QUIET, QUIET, QUIET, LOUD, QUIET])
    assert Planted(spans, groups).measure().tensors["bits"].tolist() == [8, 8, 4, 4, 4, 8, 8]


def test_classes_fall_apart_by_width() -> None:
    bits, ranges = torch.tensor([8, 4, 4, 8, 4]), Record({"timesteps": STEPS, "shares": torch.ones(5)})
    quantizer = Toy(EACH, (4, 8)).conv.input_quantizer
    set_widths(quantizer, bits)

    def members(classes: Tensor | None) -> dict[tuple[int, ...], int]:
        """The steps of each row, and its width."""
        rows, widths = operand_rows(quantizer, ranges, classes)
        return {tuple(sorted(set(p))): w for p, w in zip(rows.positions.tolist(), widths.tolist(), strict=True)}

    assert members(ONE_ROW) == {(0, 2, 3): 4, (1, 4): 8}
    assert members(torch.tensor([0, 0, 0, 1, 1])) == {(0, 2): 4, (1,): 8, (3,): 4, (4,): 8}
    assert members(None) == {(0,): 4, (1,): 8, (2,): 4, (3,): 4, (4,): 8}
    quantizer = AffineQuantizer(AffineGrid(bits=8), quantizer.clock)
    assert members(ONE_ROW) == {(0, 1, 2, 3, 4): 8}


def test_the_forward_process_is_read_between_whole_timesteps() -> None:
    process = ForwardProcess(torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), "epsilon")
    assert process.signal_share(torch.tensor([0.0, 0.5, 1.0, 1.75, 9.0])).tolist() == [1.0, 0.75, 0.5, 0.3125, 0.25]


def test_flow_matching_has_no_such_ratio(tiny_pipeline) -> None:
    pipe = tiny_pipeline()
    assert forward_process(pipe).prediction == "epsilon"
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        UsageError, match=r"FlowMatchEulerDiscreteScheduler has no signal-to-noise.*leave out --step-bits"
    ):
        forward_process(pipe)
