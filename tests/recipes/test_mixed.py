"""Step-aware mixed precision from end to end: rows, records, checkpoints, resuming, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tcaq
from tcaq.errors import CheckpointError, PlanError, RunError, UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.models.denoiser import clock_of
from tcaq.models.units import default_plan
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.mixed import MixedProbabilityQuantizer, MixedQuantizer, row_widths
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize, resolved_plan
from tcaq.report.story import read_story
from tcaq.runs import Run
from tcaq.spec.grid import AffineGrid, UnitGrid
from tcaq.spec.plan import Plan, Rule
from tests.recipes.test_quantize import files
from tests.recipes.test_related import small

MIXED = {"mixed": {"bits": [4, 8]}}
LAYER = "mid_block.resnets.0.conv1"


def table(folder: Path, stage: str):
    return next(record for _, record in Run.read(folder / "run").results(stage))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """PTQD with two widths, and where it is."""
    from tests.conftest import build_pipeline

    folder = tmp_path_factory.mktemp("mixed") / "out"
    return quantize(build_pipeline(), small("ptqd", **MIXED), folder), folder


def test_the_widths_are_those_of_the_rule(done):
    pipe, folder = done
    record = table(folder, "widths")
    forward, (narrow, wide) = record.tensors["forward"], record.tensors["quantized"]
    scheduler, timesteps = pipe.scheduler, record.tensors["timesteps"]
    share = scheduler.alphas_cumprod[timesteps].double()
    torch.testing.assert_close(forward, share / (1 - share))
    assert bool((wide > narrow).all())
    expected = torch.where(narrow > forward, 4, 8).flip(0)  # groups ascend in t, trajectories descend
    assert record.tensors["bits"].tolist() == expected.tolist()
    assert set(expected.tolist()) == {4, 8}
    for _, layer in quantized_layers(pipe.unet):
        for quantizer in layer.operands.values():
            widths = row_widths(quantizer).tolist()
            assert widths == (expected.tolist() if quantizer.grid.wider else [8] * len(widths))


def test_what_has_eight_bits_anyway_keeps_them_and_weights_keep_one_width(done):
    by_name = dict(quantized_layers(done[0].unet))
    assert not by_name["conv_in"].input_quantizer.grid.wider
    assert isinstance(by_name[LAYER].input_quantizer, MixedQuantizer)
    assert str(by_name[LAYER].weight_quantizer.grid) == "auint4"
    mix = by_name["mid_block.attentions.0.mix"]
    assert isinstance(mix.left_quantizer, MixedProbabilityQuantizer)
    assert [str(quantizer.grid) for quantizer in mix.operands.values()] == ["unit4|8", "auint4|8"]


def test_each_width_has_one_row_found_on_its_own_steps(tiny_pipeline, tmp_path):
    recipe = small("ptqd", reconstruction=None, **MIXED)
    quantize(tiny_pipeline(), recipe, tmp_path / "out")
    bits = table(tmp_path / "out", "widths").tensors["bits"]
    ranges, scales = table(tmp_path / "out", "observe").tensors, table(tmp_path / "out", "scale/inputs").tensors
    for width in (4, 8):
        groups = (bits == width).nonzero().flatten()
        steps = len(bits) - 1 - groups
        low, high = (ranges[f"{LAYER}|input|{end}"][steps] for end in ("low", "high"))
        seen = torch.cat([ranges[f"{LAYER}|input|rows"][steps].flatten(), low.min()[None], high.max()[None]])
        scale, zero = search_range(
            seen[None],
            width,
            signed=False,
            symmetric=False,
            power=recipe.ranges.power,
            candidates=recipe.ranges.input_candidates,
        )
        for group in groups.tolist():
            torch.testing.assert_close(scales[f"{LAYER}|input|scale"][group], scale[0])
            assert float(scales[f"{LAYER}|input|zero_point"][group]) == float(zero)


def test_reconstruction_learns_one_step_size_for_each_width(done):
    for name, layer in quantized_layers(done[0].unet):
        for quantizer in layer.operands.values():
            widths = row_widths(quantizer)
            assert len(quantizer.scale.unique()) == len(widths.unique()) == (2 if quantizer.grid.wider else 1), name
            assert len(quantizer.scale[widths == 8].unique()) == 1, name


@torch.no_grad()
def test_the_checkpoint_is_the_model_in_memory_and_says_its_widths(done):
    pipe, folder = done
    loaded = DDIMPipeline.from_pretrained(folder)
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for when in (torch.tensor([3, 400, 900]), torch.tensor(0), torch.tensor(999)):
        assert torch.equal(loaded.unet(x, when).sample, pipe.unet(x, when).sample)
    config = loaded.unet.config.quantization_config
    assert list(config.step_bits) == table(folder, "widths").tensors["bits"].tolist()
    assert "activations by step group: " in (folder / "README.md").read_text()
    name = f"{LAYER}.input_quantizer.top"
    assert loaded.unet.state_dict()[name].tolist() == [2**bits - 1 for bits in config.step_bits]


@torch.no_grad()
def test_all_widths_run_in_integers(done):
    pipe = tcaq.load(done[1])
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    when = torch.tensor([0, 500, 999])  # of both widths
    fake = pipe.unet(x, when).sample
    assert not tcaq.lower(pipe).kept
    difference = (pipe.unet(x, when).sample - fake).abs()
    assert difference.median() <= 0.05 * fake.std()  # codes that tip over spread
    assert difference.square().mean() <= 0.05 * fake.var()


def test_a_damaged_width_is_found(done, tmp_path):
    shutil.copytree(done[1], tmp_path / "copy")
    (path,) = (tmp_path / "copy" / "unet").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[f"{LAYER}.input_quantizer.top"][0] = 63
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="top"):
        tcaq.load(tmp_path / "copy")


def test_stopped_before_and_after_the_choice_it_ends_in_the_same_bytes(done, tiny_pipeline, tmp_path):
    class StopError(Exception):
        pass

    for stage, at in (("widths", 0), ("widths", 1), ("scale/inputs", 1), ("reconstruct/0", 5)):

        def stop(name, done_, total, resumed, stage=stage, at=at):
            if (name, done_, resumed) == (stage, at, False):
                raise StopError

        with pytest.raises(StopError):
            quantize(tiny_pipeline(), small("ptqd", **MIXED), tmp_path / "out", on_progress=stop)
    quantize(tiny_pipeline(), small("ptqd", **MIXED), tmp_path / "out")
    assert files(tmp_path / "out") == files(done[1])


def test_other_widths_never_reuse_the_run(done, tiny_pipeline):
    before = files(done[1])
    with pytest.raises(RunError, match=r"recipe\.mixed"):
        quantize(tiny_pipeline(), small("ptqd", activations=3, mixed={"bits": [3, 8]}), done[1])
    assert files(done[1]) == before


def test_the_report_tells_the_same(done):
    story = read_story(done[1])
    assert story.bits == "W4A4/8"
    widths = story.widths
    assert widths is not None
    assert list(widths.bits) == table(done[1], "widths").tensors["bits"].flip(0).tolist()
    assert set(widths.quantized) == {4, 8}
    assert sum(count for *_, count in widths.runs) == len(widths.timesteps)


@pytest.mark.parametrize(
    ("program", "options"),
    [("apqdm", {}), ("tcaq", {"reconstruction": None, "network": None, "alignment": None, "correction": None}),
     ("qdiffusion", {"step_groups": 3, "reconstruction": None})],
)  # fmt: skip
def test_every_recipe_with_several_groups_may_mix(tiny_pipeline, tmp_path, program, options):
    pipe = quantize(tiny_pipeline(), small(program, **MIXED, **options), tmp_path / "out")
    bits = table(tmp_path / "out", "widths").tensors["bits"].tolist()
    assert bits[0] == 8  # no width is enough at the last step: the widest
    assert row_widths(dict(quantized_layers(pipe.unet))[LAYER].input_quantizer).tolist() == bits
    assert len(bits) == clock_of(pipe.unet).count
    loaded = tcaq.load(tmp_path / "out")
    x, when = torch.randn(2, 1, 16, 16), torch.tensor([10, 700])
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, when).sample, pipe.unet(x, when).sample)


def test_without_the_option_nothing_is_there(tiny_pipeline):
    recipe = preset_recipe("ptqd", "full")
    assert recipe.mixed is None
    assert "mixed" not in recipe.model_dump(mode="json")
    plan = resolved_plan(tiny_pipeline().unet, recipe)
    assert "wider" not in plan.model_dump_json()


def test_the_plan_names_both_widths(tiny_pipeline):
    plan = resolved_plan(tiny_pipeline().unet, preset_recipe("ptqd", "full", **MIXED))
    rows = {row.name: row for row in plan.layers}
    assert str(rows[LAYER].inputs[0]) == "auint4|8"
    assert str(rows["conv_in"].inputs[0]) == "auint8"
    assert type(plan).model_validate_json(plan.model_dump_json()) == plan


def test_plans_and_widths_that_do_not_fit_are_refused(tiny_pipeline):
    unet = tiny_pipeline().unet
    free = AffineGrid(bits=4, wider=(6,))
    rules = (
        Rule(match="*", kinds=("scores",), left=free, right=free),
        Rule(match="*", kinds=("mix",), left=UnitGrid(bits=8), right=AffineGrid(bits=8)),
        Rule(match="*", weight=AffineGrid(bits=4), input=AffineGrid(bits=8)),
    )
    with pytest.raises(PlanError, match="4 or 6 bits by step, the recipe chooses from 4 or 8; leave `wider` out"):
        resolved_plan(unet, preset_recipe("ptqd", "full", **MIXED), Plan(rules=rules))
    with pytest.raises(PlanError, match="the recipe chooses from no widths"):
        resolved_plan(unet, preset_recipe("ptqd", "full"), Plan(rules=rules))
    with pytest.raises(PlanError, match="no operand of the plan has 4 bits"):
        resolved_plan(unet, preset_recipe("ptqd", "full", **MIXED), default_plan(unet, 4, 8, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": 8}, "activations has 8 bits, the narrowest of mixed.bits is 4"),
        ({"step_groups": 1}, "more than one step group"),
        ({"linear_inputs": "token"}, "a grid for each token has one width"),
        ({"mixed": {"bits": [8, 4]}}, "bits must ascend strictly"),
        ({"mixed": {"bits": [4]}}, "mixed.bits: Tuple should have at least 2 items"),
        ({"mixed": {"bits": [4, 9]}}, "less than or equal to 8"),
    ],
)
def test_recipes_that_cannot_mix_say_why(options, message):
    with pytest.raises(UsageError, match=message):
        preset_recipe("ptqd", "full", **{**MIXED, **options})


def test_a_weight_has_one_width():
    with pytest.raises(UsageError, match="a weight has one width for all steps"):
        Plan.parse({"rules": [{"match": "*", "weight": {"bits": 4, "wider": [8]}}]}, where="plan")
