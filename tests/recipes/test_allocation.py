"""Widths by layer from end to end: the plan, the size, checkpoints, integers, resuming, refusals."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline

import tcaq
from tcaq.cli.options import make_recipe
from tcaq.errors import PlanError, UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.layers.split import SplitConv2d
from tcaq.layers.weighted import QuantizedWeight
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize, resolved_plan
from tcaq.report.story import read_story, weight_bytes
from tcaq.runs import Run
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import Plan, Rule
from tcaq.spec.recipe import Recipe
from tests.recipes.test_quantize import files
from tests.recipes.test_related import small

CHOICE = {"bits": [2, 3, 4, 6, 8], "inputs": 12, "batch": 2}
TRADED = {"weights": 3, "allocation": CHOICE, "input_allocation": CHOICE}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """TCAQ-DM with widths by layer, and where it is."""
    from tests.conftest import build_pipeline

    folder = tmp_path_factory.mktemp("allocation") / "out"
    recipe = small("tcaq", **TRADED, alignment=None, network=None, correction=None)
    return quantize(build_pipeline(), recipe, folder), folder


def chosen(folder, stage="allocate"):
    record = next(record for _, record in Run.read(folder / "run").results(stage))
    return dict(zip(record.meta["layers"], record.tensors["bits"].tolist(), strict=True))


def test_every_weight_has_the_width_that_was_chosen_for_it(done):
    pipe, folder = done
    bits = chosen(folder)
    there = {n: q for n, q in quantized_layers(pipe.unet) if isinstance(q, QuantizedWeight)}
    assert {name: there[name].weight_quantizer.grid.bits for name in bits} == bits
    assert len(set(bits.values())) > 1
    others = set(there) - set(bits)
    assert {"conv_in", "conv_out"} <= others
    assert {there[name].weight_quantizer.grid.bits for name in others} == {8}
    table = pipe.unet.config.quantization_config.plan
    assert {row.name: row.weight.bits for row in table.layers if row.name in bits} == bits


def test_every_input_has_the_width_that_was_chosen_for_it(done):
    pipe, folder = done
    bits = chosen(folder, "allocate-inputs")
    there = {n: q.input_quantizer.grid.bits for n, q in quantized_layers(pipe.unet) if isinstance(q, QuantizedWeight)}
    assert {name: there[name] for name in bits} == bits
    assert len(set(bits.values())) > 1
    time = {name for name in there if "time_emb" in name}
    assert set(there) - set(bits) == {"conv_in", "conv_out"} | time, "what has 8 bits anyway keeps them"
    table = pipe.unet.config.quantization_config.plan
    assert {row.name: row.inputs[0].bits for row in table.layers if row.name in bits} == bits
    products = {row.name: [str(grid) for grid in row.inputs] for row in table.layers if row.kind == "scores"}
    assert {grid for grids in products.values() for grid in grids} == {"auint4"}, "attention products keep theirs"


def test_products_read_no_more_bits_than_with_one_width(done):
    record = next(record for _, record in Run.read(done[1] / "run").results("allocate-inputs"))
    bits, sizes = record.tensors["bits"], record.tensors["sizes"]
    assert int((bits * sizes).sum()) <= 4 * int(sizes.sum())
    by_name = dict(zip(record.meta["layers"], sizes.tolist(), strict=True))
    conv = dict(done[0].unet.named_modules())["mid_block.resnets.0.conv1"]
    assert by_name["mid_block.resnets.0.conv1"] == 4 * 4 * conv.in_channels * conv.out_channels * 9


def test_the_file_is_no_larger_than_with_one_width(tiny_pipeline, tmp_path):
    for name, options in (("traded", TRADED), ("uniform", {"weights": 3})):
        quantize(tiny_pipeline(), small("mse", **options), tmp_path / name)
    # each layer pads its last byte, and the plan says more
    assert weight_bytes(tmp_path / "traded") <= weight_bytes(tmp_path / "uniform") + 2000
    assert "W(2 to " in read_story(tmp_path / "traded").bits


@torch.no_grad()
def test_the_checkpoint_is_the_model_in_memory(done):
    pipe, folder = done
    loaded = DDIMPipeline.from_pretrained(folder)
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for when in (torch.tensor([3, 400, 900]), torch.tensor(0)):
        assert torch.equal(loaded.unet(x, when).sample, pipe.unet(x, when).sample)


@torch.no_grad()
def test_all_widths_run_in_integers(done):
    pipe = tcaq.load(done[1])
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    when = torch.tensor([0, 500, 999])
    fake = pipe.unet(x, when).sample
    assert not tcaq.lower(pipe).kept
    assert (pipe.unet(x, when).sample - fake).square().mean() <= 0.05 * fake.var()  # codes that tip over spread


def test_stopped_around_the_choice_it_ends_in_the_same_bytes(tiny_pipeline, tmp_path):
    class StopError(Exception):
        pass

    recipe = small("mse", **TRADED)
    quantize(tiny_pipeline(), recipe, tmp_path / "undisturbed")
    for stage, at in (("allocate", 0), ("allocate", 1), ("allocate-inputs", 0), ("allocate-inputs", 1)):

        def stop(name, done_, total, resumed, stage=stage, at=at):
            if (name, done_, resumed) == (stage, at, False):
                raise StopError

        with pytest.raises(StopError):
            quantize(tiny_pipeline(), recipe, tmp_path / "out", on_progress=stop)
    quantize(tiny_pipeline(), recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize("program", ["minmax", "apqdm"])
def test_recipes_without_fits_take_it_too(program, tiny_pipeline, tmp_path):
    pipe = quantize(tiny_pipeline(), small(program, **TRADED), tmp_path / "out")
    layers = dict(quantized_layers(pipe.unet))
    for stage, part in (("allocate", "weight_quantizer"), ("allocate-inputs", "input_quantizer")):
        bits = chosen(tmp_path / "out", stage)
        assert {name: getattr(layers[name], part).grid.bits for name in bits} == bits


def test_halves_of_a_split_layer_share_their_width(tiny_pipeline, tmp_path):
    pipe = quantize(tiny_pipeline(), small("qdiffusion", **TRADED), tmp_path / "out")
    bits = chosen(tmp_path / "out")
    split = {name: layer for name, layer in pipe.unet.named_modules() if isinstance(layer, SplitConv2d)}
    assert split
    for name, layer in split.items():
        halves = (layer.first, layer.second)
        assert {half.weight_quantizer.grid.bits for half in halves} == {bits[name]}
        assert {half.input_quantizer.grid.bits for half in halves} == {4}
    assert not set(split) & set(chosen(tmp_path / "out", "allocate-inputs"))


def test_it_is_off_by_default_and_leaves_no_trace_there():
    assert Recipe().allocation is Recipe().input_allocation is None
    assert not any("allocation" in field for field in Recipe().model_dump(mode="json"))


def test_the_command_line_switches_it():
    common = {"weights": 3, "activations": 4}
    plain = make_recipe("tcaq", "quick", **common)
    assert make_recipe("tcaq", "quick", layer_bits="6, 2,3", **common) == plain.changed(
        {"allocation": {"bits": [2, 3, 6]}}
    )
    mean = make_recipe("tcaq", "quick", layer_bits="2,4", mean_bits=2.5, **common)
    assert mean == plain.changed({"allocation": {"bits": [2, 4], "mean": 2.5}})
    inputs = make_recipe("tcaq", "quick", input_bits="3,8", mean_input_bits=4.5, **common)
    assert inputs == plain.changed({"input_allocation": {"bits": [3, 8], "mean": 4.5}})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layer_bits": "2,x"}, r"--layer-bits '2,x': give whole numbers"), ({"layer_bits": "3"}, "at least 2 items"),
     ({"layer_bits": "4,6"}, r"\(4, 6\) must reach below and above weights, 4 bits"), ({"layer_bits": "2,2,6"}, "ascend strictly"),
     ({"layer_bits": "2,4", "mean_bits": 5.0}, r"must reach below and above allocation\.mean, 5 bits"),
     ({"mean_bits": 3.0}, r"--mean-bits 3: say by --layer-bits"),
     ({"mean_input_bits": 3.5}, r"--mean-input-bits 3.5: say by --input-bits"),
     ({"input_bits": "5,6"}, r"input_allocation.bits \(5, 6\) must reach below and above activations"),
     ({"input_bits": "3,6", "step_bits": "4,8"}, "by layer .* or by step")],
)  # fmt: skip
def test_what_cannot_be_chosen_from_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        make_recipe("tcaq", "quick", weights=4, activations=4, **options)


def test_a_plan_without_such_weights_is_refused(tiny_pipeline):
    grid = AffineGrid(bits=8)
    plan = Plan(
        rules=(Rule(match="*", kinds=("scores", "mix"), reason="float"), Rule(match="*", weight=grid, input=grid))
    )
    with pytest.raises(PlanError, match="no weight of the plan has 3 bits"):
        quantize(tiny_pipeline(), small("tcaq", **TRADED), plan=plan)
    with pytest.raises(PlanError, match="no input of the plan has 4 bits"):
        quantize(tiny_pipeline(), small("tcaq", input_allocation=CHOICE), plan=plan)


def test_the_plan_asked_for_is_that_of_one_width(tiny_pipeline):
    recipe = preset_recipe("tcaq", "full", **TRADED)
    plain = preset_recipe("tcaq", "full", weights=3)
    assert resolved_plan(tiny_pipeline().unet, recipe) == resolved_plan(tiny_pipeline().unet, plain)
