"""The recipes of the related systems: each runs from end to end, and does what sets it apart."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

import tcaq
from tcaq.errors import UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.layers.split import SplitConv2d
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.correction import correction_of
from tcaq.models.denoiser import clock_of
from tcaq.models.sampler import Trajectories, predict, record
from tcaq.models.seeds import image_seeds
from tcaq.models.time import is_time_layer, time_unit
from tcaq.models.units import resolve
from tcaq.numerics.correction import fit_noise
from tcaq.numerics.shares import skewed_normal
from tcaq.recipes.job import Job
from tcaq.recipes.presets import PRESETS, preset_recipe
from tcaq.recipes.quantize import quantize, resolved_plan
from tcaq.recipes.registry import RECIPES, Entry, entry
from tcaq.recipes.start import BLOCKS
from tcaq.runs import Run
from tcaq.spec.law import SkewedNormal
from tcaq.spec.plan import ResolvedPlan
from tcaq.stages.reconstruct import fit
from tcaq.stages.weigh import weigh
from tests.stages.conftest import build, initialise

SMALL = {
    "calibration": {"images": 4, "steps": 6, "batch": 2},
    "ranges": {"values": 200, "weight_candidates": 10, "input_candidates": 10},
    "reconstruction": {"iterations": 3, "inputs": 8, "batch": 4},
    "grouping": {"groups": 3, "iterations": 3, "inputs": 8, "batch": 4},
}


def small(program: str, **options: object):
    sizes = {key: value for key, value in SMALL.items() if getattr(preset_recipe(program, "full"), key) is not None}
    return preset_recipe(program, "full", **{**sizes, **options})


@pytest.mark.parametrize("program", [name for name in RECIPES if name != "tcaq"])
def test_it_runs_and_its_model_samples(tiny_pipeline, tmp_path, program):
    pipe = quantize(tiny_pipeline(), small(program), tmp_path / "out")
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([10, 700])
    with torch.no_grad():
        assert torch.isfinite(pipe.unet(x, t).sample).all()
    left = [
        name
        for name, layer in quantized_layers(pipe.unet)
        if isinstance(layer, QuantizedWeight) and layer.weight is not None
    ]
    assert not left  # nothing but packed codes stays
    assert not any("equalize" in name for name in Run.read(tmp_path / "out" / "run").finished())  # TCR is TCAQ's own


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("program", RECIPES)
def test_what_a_preset_leaves_out_stays_out(program, preset):
    made = preset_recipe(program, preset)
    for part in ("reconstruction", "alignment", "network"):
        if PRESETS[preset].get(part, {}) is None:
            assert getattr(made, part) is None


def test_ptq4dm_reads_steps_by_its_law(tiny_pipeline, tmp_path):
    quantize(tiny_pipeline(), small("ptq4dm"), tmp_path / "out")
    run = Run.read(tmp_path / "out" / "run")
    weights = next(found for _, found in run.results("weigh")).tensors["weights"]
    timesteps = next(found for _, found in run.results("collect/0")).tensors["timesteps"]
    torch.testing.assert_close(weights, skewed_normal(timesteps, 999, 0.4, 0.4))
    assert weights[-1] == weights.max()  # what falls below zero is heaped up there
    shares = next(found for _, found in run.results("observe")).tensors["shares"]
    torch.testing.assert_close(shares, weights / weights.sum())


def test_qdiffusion_splits_shortcuts_and_skips_steps(tiny_pipeline, tmp_path):
    pipe = quantize(tiny_pipeline(), small("qdiffusion", calibration={"images": 2, "steps": 6}), tmp_path / "out")
    assert sum(isinstance(module, SplitConv2d) for module in pipe.unet.modules()) == 6
    run = Run.read(tmp_path / "out" / "run")
    weights = next(found for _, found in run.results("weigh")).tensors["weights"]
    assert weights.tolist() == [1, 0, 0, 0, 0, 1]
    assert "reconstruct/0" in run.finished()


def test_tfmqdm_keeps_one_row_but_for_time(tiny_pipeline):
    pipe = quantize(tiny_pipeline(), small("tfmqdm", reconstruction=None))
    for name, layer in quantized_layers(pipe.unet):
        for quantizer in layer.operands.values():
            rows = quantizer.scale.unique()
            assert (len(rows) > 1) == is_time_layer(pipe.unet, name), name


def test_tfmqdm_fits_time_as_one_and_then_leaves_it_alone(tiny_pipeline, tmp_path):
    options = {"reconstruction": {"iterations": 60, "inputs": 8, "batch": 6, "schedule": "joint"}}
    pipe = tiny_pipeline()
    steps = torch.tensor([830, 664, 498, 332, 166, 0])
    with torch.no_grad():
        expected = time_unit(pipe.unet).module(steps)
    quantize(pipe, small("tfmqdm", **options), tmp_path / "joint")
    run = Run.read(tmp_path / "joint" / "run")
    losses = next(found for _, found in run.results("reconstruct/time")).meta
    assert losses["loss_after"] < losses["loss_before"]
    assert not any("time" in name for name, _ in run.results("reconstruct/0"))
    # the model that is saved still puts out what the joint fit ended with: no later fit touched it
    clock_of(pipe.unet).set(steps)
    with torch.no_grad():
        found = time_unit(pipe.unet).module(steps)
    error = float((found - expected).square().sum() / expected.square().sum())
    assert error == pytest.approx(losses["loss_after"], rel=1e-3)


def test_the_time_path_is_what_the_blocks_receive(tiny_pipeline):
    unet, steps, seen = tiny_pipeline().unet, torch.tensor([10, 700]), []
    blocks = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    handles = [
        block.time_emb_proj.register_forward_hook(lambda _, args, out: seen.append((id(_), out))) for block in blocks
    ]
    with torch.no_grad():
        unet(torch.randn(2, 1, 16, 16), steps)
        for handle in handles:
            handle.remove()
        outputs = dict(seen)
        expected = torch.cat([outputs[id(block.time_emb_proj)] for block in blocks], dim=1)
        assert torch.equal(time_unit(unet).module(steps), expected)


@pytest.mark.parametrize("program", RECIPES)
def test_the_same_plan_quantizes_the_same_layers_at_the_same_bits(tiny_pipeline, program):
    unet = tiny_pipeline().unet

    def bits(name: str) -> list[tuple[str, int | None, list[int]]]:
        rows = resolved_plan(unet, preset_recipe(name, "full")).layers
        return [(row.name, row.weight and row.weight.bits, [grid.bits for grid in row.inputs]) for row in rows]

    assert bits(program) == bits("minmax")


def test_the_authors_plans_differ_as_their_codes_do(tiny_pipeline):
    unet = tiny_pipeline().unet

    def rows(name: str):
        recipe = preset_recipe(name, "full", layers="author")
        return {row.name: row for row in resolve(unet, entry(name).plan(unet, recipe)).layers}

    mix, conv = "mid_block.attentions.0.mix", "mid_block.resnets.0.conv1"
    assert rows("ptq4dm")[mix].is_float
    assert rows("ptq4dm")[conv].weight.symmetric
    assert [grid.bits for grid in rows("qdiffusion")[mix].inputs] == [8, 4]
    assert not rows("qdiffusion")[conv].weight.symmetric


def test_the_recipe_in_the_documentation_works(tiny_pipeline, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "add-a-recipe.md").read_text()
    code, line = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 80
    module = ModuleType("stepwise")
    exec(compile(code, "stepwise", "exec"), module.__dict__)
    added = eval("{" + line + "}", {"Entry": Entry, "BLOCKS": BLOCKS, "stepwise": module})
    monkeypatch.setitem(RECIPES, "stepwise", added["stepwise"])
    quantize(tiny_pipeline(), small("stepwise"), tmp_path / "out")
    assert "reconstruct/0" in Run.read(tmp_path / "out" / "run").finished()


def test_an_unknown_recipe_is_answered_with_those_there_are():
    with pytest.raises(UsageError, match="unknown recipe 'tcak'; known: minmax, mse, ptq4dm"):
        preset_recipe("tcak", "full")


@pytest.mark.parametrize(
    ("program", "options", "said"),
    [
        (
            "minmax",
            {"reconstruction": {}, "network": {}},
            "recipe 'minmax' does nothing with `network`, `reconstruction`",
        ),
        ("qdiffusion", {"alignment": {"rounds": 3}}, "recipe 'qdiffusion' does nothing with `alignment`"),
        ("apqdm", {"bypass": {}}, "recipe 'apqdm' does nothing with `bypass`"),
        ("apqdm", {"step_groups": 4}, "apqdm learns which steps share a row: step_groups is 4, it must be 'per-step'"),
        ("ptqd", {"correction": {"strengths": [0.5]}}, "ptqd corrects at full strength"),
    ],
)
def test_what_a_recipe_would_leave_out_without_a_word_is_refused(tiny_pipeline, tmp_path, program, options, said):
    with pytest.raises(UsageError, match=said):
        quantize(tiny_pipeline(), small(program, **options), tmp_path / "out")
    assert not list((tmp_path / "out").glob("run/stages/*"))


def test_the_time_path_of_a_half_precision_model_is_fitted_in_float32(tiny_pipeline, tmp_path, monkeypatch):
    seen = set()

    def watched(unit, lessons, *rest):
        seen.update(target.dtype for part in lessons.parts for target in part.targets)
        return fit(unit, lessons, *rest)

    monkeypatch.setattr("tcaq.recipes.job.fit", watched)
    scene = build(tiny_pipeline())
    initialise(scene)
    scene.unet.to(torch.bfloat16)
    with Run.open(tmp_path / "run", {}) as run:
        Job(scene.pipe, small("tfmqdm"), ResolvedPlan(layers=()), run).reconstruct_time(scene.trajectories.timesteps)
    assert seen == {torch.float32}
    assert next(scene.unet.parameters()).dtype == torch.bfloat16


def test_ptq4dms_law_is_of_timesteps_not_of_calls(tiny_pipeline):
    x = torch.randn(6, 2, 1, 16, 16)
    twice = Trajectories(x, torch.tensor([900, 900, 500, 500, 20, 20]))
    weights = weigh(tiny_pipeline(), twice, SkewedNormal(mean=0.4, deviation=0.4)).tensors["weights"]
    expected = skewed_normal(torch.tensor([900, 500, 20]), 999, 0.4, 0.4)
    torch.testing.assert_close(weights, (expected / 2).repeat_interleave(2))


def test_ptqd_takes_out_what_it_measured_and_is_saved(tiny_pipeline, tmp_path):
    pipe = tiny_pipeline()
    _, trajectories = record(pipe, image_seeds("calibration", 0, 0, 4), 6)
    expected = predict(pipe.unet, trajectories)
    quantize(pipe, small("ptqd"), tmp_path / "out")
    correction = correction_of(pipe.unet)
    assert bool((correction.bias != 0).all())
    corrected = predict(pipe.unet, trajectories)
    slope, bias = correction.slope.clone(), correction.bias.clone()
    correction.set_rows(torch.zeros_like(slope), torch.zeros_like(bias))
    plain = predict(pipe.unet, trajectories)
    correction.set_rows(slope, bias)
    # what is left neither follows the prediction nor shifts it (it may be larger: dividing by 1 + k < 1 amplifies the rest)
    for step, e in enumerate(expected):
        before, after = fit_noise(plain[step], e), fit_noise(corrected[step], e)
        assert abs(float(after.slope)) < 1e-4 < abs(float(before.slope))
        assert float(after.bias.abs().max()) < 1e-4
    # the tables are those of the fit, and travel with the checkpoint
    group = int(torch.searchsorted(clock_of(pipe.unet).boundaries, trajectories.timesteps[2].float(), right=True))
    fitted = fit_noise(plain[2], expected[2])
    torch.testing.assert_close(slope[group], fitted.slope.float(), rtol=1e-3, atol=1e-5)
    loaded = DDIMPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(predict(loaded.unet, trajectories), corrected)
    assert loaded.unet.config.quantization_config.correction == 1
    assert type(tcaq.load(tmp_path / "out").unet).__name__ == "UNet2DModel"


def test_ptqd_gives_a_stochastic_sampler_less_noise_to_add(tiny_pipeline, tmp_path):
    pipe = DDPMPipeline(tiny_pipeline().unet, DDPMScheduler())
    quantize(pipe, small("ptqd", calibration={"images": 2, "steps": 3}), tmp_path / "out")
    variance = next(found for _, found in Run.read(tmp_path / "out" / "run").results("correct")).tensors["variance"]
    loaded = DDPMPipeline.from_pretrained(tmp_path / "out")
    for scheduler in (pipe.scheduler, loaded.scheduler):
        assert type(scheduler) is tcaq.NoiseAwareDDPMScheduler
        assert scheduler.config.quantization_noise["variance"] == pytest.approx(variance.tolist())
    plain = DDPMScheduler()
    for made in (plain, loaded.scheduler):
        made.set_timesteps(3)
    t = int(plain.timesteps[1])
    assert 0 < float(loaded.scheduler._get_variance(t)) < float(plain._get_variance(t))


def test_rows_that_start_equal_are_learned_as_one(tiny_pipeline):
    pipe = quantize(tiny_pipeline(), small("ptqd", reconstruction={"iterations": 5, "inputs": 8, "batch": 4}))
    changed = 0
    plain = quantize(tiny_pipeline(), small("ptqd", reconstruction=None))
    for (name, layer), (_, other) in zip(quantized_layers(pipe.unet), quantized_layers(plain.unet), strict=True):
        for operand, quantizer in layer.operands.items():
            assert len(quantizer.scale.unique()) == 1, name
            changed += int(quantizer.scale[0] != other.operands[operand].scale[0])
    assert changed > 20
