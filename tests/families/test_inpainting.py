"""A pipeline that paints into pictures, its U-Net with nine input channels: quantized, saved, sampled, exported."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FluxInpaintPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from typer.testing import CliRunner

import tcaq
from tcaq.cli import app
from tcaq.errors import UsageError
from tcaq.export.example import example_of, first_call
from tcaq.models.card import card
from tcaq.models.config import TcaqConfig
from tcaq.models.inpainting import masks
from tcaq.models.prompting import call_options, resolve_conditions
from tcaq.models.sampler import record, sample
from tcaq.models.trajectories import predict
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import identity, outcome, with_conditions
from tcaq.spec.conditions import Conditions
from tcaq.spec.pictures import pictures_in
from tcaq.spec.plan import ResolvedPlan
from tcaq.spec.steps import StepGroups

from .tiny import clip, clip_encoder, conditional_unet, kl_decoder

SEEDS = (1, 2, 3)
QUANTIZE = ["--preset", "fast", "--samples", 3, "--steps", 2, "--weights", 8, "--activations", 8, "--no-correction"]


def inpainting():
    torch.manual_seed(0)
    return StableDiffusionInpaintPipeline(
        vae=kl_decoder(), text_encoder=clip_encoder(), tokenizer=clip(), unet=conditional_unet(in_channels=9),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("inpainting"), np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(2):
        pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number}.png")
    inpainting().save_pretrained(root / "float")
    return root


@pytest.fixture
def conditions(folder):
    return Conditions(prompts=("cat", "sea"), height=16, width=16, pictures=pictures_in(folder / "pictures"))


def test_the_denoiser_is_given_the_picture_and_a_hole_of_its_own(conditions):
    pipe = inpainting()
    _, calls = record(pipe, SEEDS, 2, resolve_conditions(pipe, conditions))
    given = calls.samples[0]
    assert given.shape == (3, 9, 8, 8)
    assert set(given[:, 4].unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(given[0, 4], given[2, 4])
    assert not torch.equal(given[0, 5:], given[1, 5:])
    again = record(pipe, SEEDS[2:], 2, resolve_conditions(pipe, conditions), first=2)[1].samples[0]
    torch.testing.assert_close(again[0], given[2])  # whatever the batch


def test_holes_depend_on_the_number_alone_and_lie_inside():
    one, two = masks([(24, 20)] * 2, (0, 1)), masks([(24, 20)], (1,))
    assert np.array_equal(one[1], two[0])
    assert not np.array_equal(one[0], one[1])
    for mask in one:
        share = (np.asarray(mask) > 0).mean()
        assert mask.size == (24, 20)
        assert 0.05 < share < 0.6


def test_quantized_and_sampled_on_the_command_line(folder, conditions):
    asked = ["--prompts", folder / "prompts.txt", "--size", 16, "--pictures", folder / "pictures"]
    (folder / "prompts.txt").write_text("cat\nsea\n")
    command = ["quantize", folder / "float", "--output", folder / "w8", *QUANTIZE, *asked]
    result = CliRunner().invoke(app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    original, loaded = inpainting(), tcaq.load(folder / "w8")
    calls = record(original, SEEDS, 2, resolve_conditions(original, conditions))[1]
    expected, found = (predict(pipe.unet, calls) for pipe in (original, loaded))
    assert 0 < float((found - expected).square().mean() / expected.square().mean()) < 0.02
    command = ["sample", folder / "w8", "--output", folder / "out", "--num", 2, "--steps", 2, *asked]
    result = CliRunner().invoke(app, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    assert len(list((folder / "out").iterdir())) == 2
    with moved(folder / "pictures"):  # as on another machine
        example = example_of(loaded.unet, first_call(loaded))  # what an export would be traced with
    assert example.interface.names == ["sample", "timestep", "encoder_hidden_states"]
    assert example.values[0].shape == (2, 9, 8, 10)


@contextmanager
def moved(path):
    away = path.rename(path.with_name("away"))
    yield away
    away.rename(path)


def test_the_card_tells_of_pictures_and_not_of_folders(folder, conditions):
    pipe, recipe = inpainting(), preset_recipe("tcaq", "fast", calibration={"conditions": conditions.model_dump()})
    recipe = outcome(with_conditions(pipe, recipe))
    assert str(folder) not in str(recipe)
    text = card(pipe, TcaqConfig(plan=ResolvedPlan(layers=()), groups=StepGroups(), recipe=recipe), "", {})
    assert "pipeline_tag: image-to-image" in text
    assert "sampled from the model itself: into 2 pictures" in text


def test_what_encodes_pictures_is_part_of_a_run_and_their_folder_is_not(folder, conditions):
    def who(pipe, asked):
        recipe = with_conditions(pipe, preset_recipe("tcaq", "fast", calibration={"conditions": asked.model_dump()}))
        return identity(pipe, recipe, ResolvedPlan(layers=()), None)

    pipe, other = inpainting(), inpainting()
    torch.nn.init.zeros_(other.vae.encoder.conv_in.weight)
    assert who(pipe, conditions) != who(other, conditions)
    with moved(folder / "pictures") as away:
        assert who(pipe, conditions.model_copy(update={"pictures": pictures_in(away)})) == who(pipe, conditions)


def test_pipelines_that_begin_half_way_are_asked_for_every_step(conditions):
    takes = inspect.signature(FluxInpaintPipeline.__call__).parameters
    assert takes["strength"].default < 1
    pipe = inpainting()
    assert call_options(pipe, resolve_conditions(pipe, conditions), (0,))["strength"] == 1.0


def test_pictures_are_needed_and_are_those_that_were_chosen(folder, conditions, tmp_path):
    pipe = inpainting()
    with pytest.raises(UsageError, match=r"StableDiffusionInpaintPipeline paints into pictures.*--pictures"):
        resolve_conditions(pipe)
    with pytest.raises(UsageError, match="no folder with pictures"):
        pictures_in(tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])  # as a full disk would leave it
    first, *others = pictures_in(tmp_path)
    for other in others:
        with pytest.raises(UsageError, match="holds no picture that can be read"):
            sample(pipe, (1,), 1, conditions.model_copy(update={"pictures": (other,)}))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="another picture than the one that was chosen"):
        sample(pipe, (1,), 1, conditions.model_copy(update={"pictures": (first,)}))
    assert Conditions().model_dump(mode="json").keys() == Conditions(prompts=("a",)).model_dump(mode="json").keys()
    assert "pictures" not in Conditions().model_dump(mode="json")
