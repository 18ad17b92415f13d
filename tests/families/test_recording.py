"""What each family's denoiser is given is recorded whole, kept once, and replayed to the same predictions."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline

from tcaq.errors import ModelError, UsageError
from tcaq.models.conditioning import Argument, Conditioning, same
from tcaq.models.denoiser import find_denoiser
from tcaq.models.inputs import Inputs
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import record, sample
from tcaq.models.trajectories import Drawn, Trajectories, predict, recording
from tcaq.stages.collect import collect, trajectories_of
from tcaq.stages.draw import draw_parts

from .tiny import FAMILIES, conditional_unet, conditions_of, pipeline_of

EVERY = pytest.mark.parametrize("name", FAMILIES)
SEEDS = (1, 2, 3)


@contextmanager
def outputs(denoiser):
    """Everything that the denoiser puts out inside the block, each row of each call."""
    found = []

    def keep(module, args, kwargs, output):
        found.append(output[0] if isinstance(output, tuple) else output.sample)

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@EVERY
def test_replayed_calls_predict_what_the_pipeline_saw(name):
    pipe, family = pipeline_of(name), FAMILIES[name]
    conditions = resolve_conditions(pipe, conditions_of(name))
    with outputs(find_denoiser(pipe)[1]) as seen:
        images, trajectories = record(pipe, SEEDS, 2, conditions)
    assert torch.equal(images, sample(pipe, SEEDS, 2, conditions))
    assert len(trajectories.samples) == family.calls * len(trajectories.timesteps.unique())
    expected = torch.cat([part for output in seen for part in output.split(len(SEEDS))])
    torch.testing.assert_close(
        predict(find_denoiser(pipe)[1], trajectories).flatten(0, 1), expected, rtol=1e-4, atol=1e-5
    )


@EVERY
def test_each_condition_is_kept_once_and_comes_back_from_disk(name, tmp_path):
    pipe, family = pipeline_of(name), FAMILIES[name]
    written = collect(pipe, SEEDS, 3, resolve_conditions(pipe, conditions_of(name)))
    written.save(tmp_path / "part.safetensors")
    back = trajectories_of(type(written).load(tmp_path / "part.safetensors"))
    assert bool(back.conditioning.arguments) is bool(family.conditions)
    for argument in back.conditioning.arguments.values():
        assert len(argument.values) <= family.calls  # not one a step
    for one, other in zip(trajectories_of(written).calls(), back.calls(), strict=True):
        assert torch.equal(one.sample, other.sample)
        assert torch.equal(one.timestep, other.timestep)
        assert {**one.rows, **one.whole}.keys() == {**other.rows, **other.whole}.keys()
        assert all(
            same(value, {**other.rows, **other.whole}[path]) for path, value in {**one.rows, **one.whole}.items()
        )


@EVERY
def test_images_do_not_depend_on_the_batch_and_drawn_rows_are_those_recorded(name):
    pipe = pipeline_of(name)
    conditions = resolve_conditions(pipe, conditions_of(name))
    whole = record(pipe, SEEDS, 2, conditions)[1]
    parts = [record(pipe, SEEDS[:2], 2, conditions)[1], record(pipe, SEEDS[2:], 2, conditions, first=2)[1]]
    joined = Trajectories.join(parts)
    torch.testing.assert_close(joined.samples, whole.samples, rtol=1e-3, atol=1e-4)
    drawn = draw_parts(joined, 10**6, 0)[0]
    assert len(drawn) == joined.samples.shape[0] * joined.samples.shape[1]
    denoiser = find_denoiser(pipe)[1]
    with torch.no_grad():
        together = torch.cat([part(denoiser) for part in drawn.split(5)])
    rows = predict(denoiser, joined).flatten(0, 1)
    distance = torch.cdist(together.flatten(1), rows.flatten(1))
    assert float(distance.min(dim=1).values.max()) < 1e-3
    assert len(distance.argmin(dim=1).unique()) == len(rows)


def test_the_prompt_belongs_to_the_image():
    pipe = pipeline_of("sd")
    conditions = resolve_conditions(pipe, conditions_of("sd"))
    text = record(pipe, SEEDS, 1, conditions)[1].conditioning.arguments["encoder_hidden_states"].values[1]
    third = record(pipe, SEEDS[2:], 1, conditions, first=2)[1].conditioning.arguments["encoder_hidden_states"].values[1]
    torch.testing.assert_close(text[2:], third)
    assert not torch.allclose(text[0], text[1])
    again = record(pipe, SEEDS[:1], 1, conditions, first=3)[1].conditioning.arguments["encoder_hidden_states"].values[1]
    torch.testing.assert_close(again, text[:1])  # three prompts: the fourth image has the first


def call(x: float, t: float, rows: dict, whole: dict | None = None) -> Inputs:
    return Inputs(torch.full((2, 1), x), torch.full((2,), t), rows, whole or {})


def test_halves_of_unequal_length_are_kept_and_make_no_common_batch():
    short, long = torch.ones(2, 3, 4), torch.ones(2, 5, 4)
    calls = [call(0, t, {"text": text}) for t in (9.0, 4.0) for text in (short, long)]
    trajectories = Trajectories.recorded(calls)
    assert [tuple(c.rows["text"].shape) for c in trajectories.calls()] == [(2, 3, 4), (2, 5, 4)] * 2
    assert trajectories.conditioning.arguments["text"].index.tolist() == [0, 1, 0, 1]
    with pytest.raises(UsageError, match="'text' in other shapes"):
        Drawn(trajectories, torch.arange(4), torch.zeros(4, dtype=torch.int64))[:]
    short_half, long_half = (part[:] for part in draw_parts(trajectories, 8, 0))
    assert [tuple(half.rows["text"].shape) for half in (short_half, long_half)] == [(4, 3, 4), (4, 5, 4)]


def test_batches_in_which_halves_happen_to_be_equal_join():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    equal = Conditioning.recorded([call(0, 9, {"text": zero}), call(0, 9, {"text": zero})])
    other = Conditioning.recorded([call(0, 9, {"text": zero}), call(0, 9, {"text": one})])
    joined = Conditioning.join([equal, other]).arguments["text"]
    assert torch.equal(joined.at(0), torch.cat([zero, zero]))
    assert torch.equal(joined.at(1), torch.cat([zero, one]))


def test_arguments_given_to_some_calls_only_and_plain_values():
    calls = [call(0, 9, {}, {"scale": 2.0}), call(0, 4, {"text": torch.ones(2, 3)}, {"scale": 2.0})]
    trajectories = Trajectories.recorded(calls)
    first, second = trajectories.calls()
    assert first.rows == {}
    assert torch.equal(second.rows["text"], torch.ones(2, 3))
    assert first.whole == second.whole == {"scale": 2.0}
    with pytest.raises(UsageError, match="'text' in other shapes, or not at all"):
        Drawn(trajectories, torch.arange(2), torch.zeros(2, dtype=torch.int64))[:]
    assert [set(part[:].rows) for part in draw_parts(trajectories, 4, 0)] == [set(), {"text"}]


def test_batches_that_disagree_about_rows_are_refused():
    argument = Argument((torch.ones(2, 3),), torch.tensor([0]), True)
    parts = [Conditioning({"ids": argument}), Conditioning({"ids": replace(argument, by_image=False)})]
    with pytest.raises(ModelError, match="'ids' has a row for each image"):
        Conditioning.join(parts)


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("ldm-kl", {"prompts": ("cat",)}, "LDMPipeline takes no prompt"),
        ("sd", {"labels": (3,)}, "StableDiffusionPipeline takes no class_labels"),
        ("dit", {"height": 32}, "DiTPipeline takes no height"),
    ],
)
def test_a_condition_that_the_pipeline_has_no_argument_for_is_refused(name, asked, says):
    pipe = pipeline_of(name)
    with pytest.raises(UsageError, match=says):
        resolve_conditions(pipe, type(conditions_of("sd"))(**asked))


def test_default_labels_are_spread_over_the_classes_there_are():
    pipe = pipeline_of("dit")
    assert resolve_conditions(pipe).labels[:3] == (0, 62, 125)  # sixteen of 1000
    pipe.labels = {"coat": 4, "satchel": 8, "bag": 8, "dress": 3}
    assert resolve_conditions(pipe).labels == (3, 4, 8)


def pipeline_with(call):
    """A pipeline whose call has a signature."""
    kind = type(
        "OwnPipeline",
        (DiffusionPipeline,),
        {"__call__": call, "__init__": lambda self: DiffusionPipeline.__init__(self)},
    )
    return kind()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda self, prompt, image=None: None, r"OwnPipeline starts from a picture \(image\)"),
        (lambda self, prompt, num_frames=16: None, "OwnPipeline makes videos"),
        (lambda self, prompt=None, audio_length_in_s=5.0: None, "OwnPipeline makes sound"),
        (lambda self, image_embeds, height=64: None, "OwnPipeline must be given image_embeds"),
    ],
)
def test_what_is_out_of_scope_is_refused_with_the_reason(call, says):
    with pytest.raises(ModelError, match=says):
        resolve_conditions(pipeline_with(call))


def test_two_denoisers_are_refused():
    pipe = pipeline_of("sd")
    pipe.transformer_2 = conditional_unet()
    with pytest.raises(ModelError, match=r"StableDiffusionPipeline has several denoisers \(unet, transformer_2\)"):
        find_denoiser(pipe)


def test_a_call_with_other_rows_than_images_is_refused():
    pipe = pipeline_of("ldm-kl")
    with recording(pipe.unet, 2), pytest.raises(ModelError, match="3 rows for 2 images"):
        pipe.unet(torch.zeros(3, 4, 8, 8), torch.tensor(5))
