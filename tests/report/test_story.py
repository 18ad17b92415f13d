"""What is read from a run is what its records hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tcaq.errors import RunError
from tcaq.records import Record
from tcaq.report import Entry
from tcaq.report.story import Choice, Score, StageCost, UnitLoss, imbalance, read_story, spread, weight_bytes
from tcaq.runs import Run
from tcaq.spec.recipe import Recipe
from tests.report.conftest import CONV, FD, FORWARD, LOSSES, MIX, NARROW, SENSITIVITY, TIMESTEPS, WIDE, R, plan

MAXIMA = [[1.0, 4.0, 8.0, 3.0], [1.0, 4.0, 16.0, 3.0], [1.0, 2.0, 8.0, 3.0]]


def test_every_stage_of_a_whole_run(whole: Callable[..., Entry]) -> None:
    story = read_story(whole().folder)
    (layer,) = story.equalized
    assert (layer.name, layer.timesteps.tolist(), layer.vector.tolist()) == (CONV, TIMESTEPS, R)
    torch.testing.assert_close(layer.maxima, torch.tensor(MAXIMA), rtol=0, atol=0)
    after = [[1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 4.0, 3.0], [1.0, 1.0, 2.0, 3.0]]
    torch.testing.assert_close(layer.equalized, torch.tensor(after), rtol=0, atol=0)
    assert story.choices == {
        MIX: [Choice(0, False, -2.5, 0.01, 0.04), Choice(1, True, 3.75, 0.08, 0.02), Choice(2, True, 1.25, 0.03, 0.06)]
    }, "a layer whose grid the plan fixes has no choice"
    assert story.losses == [UnitLoss(u, n, *values) for n, units in LOSSES.items() for u, values in units.items()]
    assert story.scores == [Score(0, FD[0]), Score(1, FD[1])]
    widths = story.widths
    assert widths is not None
    assert (widths.timesteps, widths.bits) == (TIMESTEPS, [4, 8, 8])
    assert (widths.forward, widths.quantized) == (FORWARD, {4: NARROW, 8: WIDE})
    assert widths.runs == [(900, 900, 4, 1), (500, 100, 8, 2)]
    noise = story.noise
    assert noise is not None
    assert (noise.timesteps, noise.slope, noise.kept) == (TIMESTEPS, [0.0625, -0.125, -0.25], 0.5)
    assert noise.bias == pytest.approx([0.1, 0.3, 0.6])
    assert noise.trials == [(0.0, 7.0), (0.5, 4.5), (1.0, 5.0)]
    assert story.costs == [
        StageCost("collect/0", 10.5, 5e8), StageCost("observe", 4.25, 6e8), StageCost("reconstruct/0", 70.0, 8e8)
    ]  # fmt: skip
    assert (story.bits, story.seconds, story.plan) == ("W4A8", 84.75, plan().layers)


def test_layers_that_chose_their_widths(traded: Callable[..., Entry]) -> None:
    story = read_story(traded().folder)
    (layer,) = story.layer_widths
    assert (layer.name, layer.size, layer.bits) == (CONV, 432, 6)
    assert layer.sensitivity == pytest.approx(dict(zip([2, 3, 6], SENSITIVITY, strict=True)))
    assert [(layer.name, layer.bits) for layer in story.input_widths] == [(CONV, 3)]
    assert story.bits == "W(6 to 6, mean 6.0)A(3 to 3, mean 3.0)"
    ran = [(str(row.weight), str(row.inputs[0])) for row in story.plan if row.weight is not None]
    assert ran == [("sint6", "auint3")], "the plan is what runs"


def test_the_two_calls_of_guidance_are_one_step(tmp_path: Path) -> None:
    recipe = Recipe(step_groups="per-step").model_dump(mode="json")
    tables = {
        "timesteps": torch.tensor([900.0, 900.0, 100.0, 100.0]), "bits": torch.tensor([8, 4]),
        "forward": torch.tensor([0.5, 0.5, 3.0, 3.0]).double(),
        "quantized": torch.tensor([[7.0, 2.0, 1.0, 9.0], [70.0, 20.0, 10.0, 90.0]]).double(),
    }  # fmt: skip
    with Run.open(tmp_path / "run", {"recipe": recipe, "plan": {"layers": []}}) as run:
        run.step("widths", lambda: Record(tables, {"widths": [4, 8]}), lambda r: r)
    widths = read_story(tmp_path).widths
    assert widths is not None
    assert widths.runs == [(900.0, 900.0, 4, 1), (100.0, 100.0, 8, 1)]
    assert (widths.forward, widths.quantized) == ([0.5, 3.0], {4: [2.0, 1.0], 8: [20.0, 10.0]})


def test_a_run_without_optional_stages(bare: Callable[..., Entry]) -> None:
    folder = bare().folder
    (folder / "run" / "timings.json").unlink()
    story = read_story(folder)
    assert story.widths is None
    assert not any((story.equalized, story.choices, story.losses, story.scores, story.costs))
    assert story.seconds is None


def test_rounds_come_in_the_order_of_their_numbers(whole: Callable[..., Entry]) -> None:
    folder = whole().folder
    stages = folder / "run" / "stages" / "score"
    (stages / "1.safetensors").rename(stages / "10.safetensors")
    (stages / "0.safetensors").rename(stages / "2.safetensors")
    assert [score.round for score in read_story(folder).scores] == [2, 10]


def test_no_run_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run of tcaq"):
        read_story(tmp_path)


def test_contrast_and_imbalance_in_closed_form(whole: Callable[..., Entry]) -> None:
    (layer,) = read_story(whole().folder).equalized
    assert layer.contrast == pytest.approx((0.75**2 * 2 + 0.25**2 + 1.25**2) ** 0.5 / 2)  # log2 r = 0, 1, 2, 0
    assert imbalance(layer.maxima) == pytest.approx((8 / 4 + 16 / 6 + 8 / 3.5) / 3)
    assert imbalance(torch.full((2, 5), 3.0)) == pytest.approx(1.0)
    assert imbalance(torch.zeros(2, 5)) == 0.0


def test_spread() -> None:
    assert spread(torch.tensor([5.0, 1.0, 2.0])) == (1.0, 2.0, 5.0)


def test_the_size_is_that_of_the_quantized_component_alone(tmp_path: Path) -> None:
    assert weight_bytes(tmp_path) is None
    for component, config in (("unet", {"quantization_config": {}}), ("vae", {})):
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(config))
        for shard, size in enumerate((1000, 234)):
            (tmp_path / component / f"model-{shard}.safetensors").write_bytes(bytes(size))
    assert weight_bytes(tmp_path) == 1234
