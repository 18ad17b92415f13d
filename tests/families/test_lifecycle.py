"""Every family through its whole life: quantized with and without gradients, saved, loaded, sampled under two schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline

import tcaq
from tcaq.layers.insert import quantized_layers
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import load_pipeline
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import record, sample
from tcaq.models.switch import use_scheduler
from tcaq.models.trajectories import predict
from tcaq.recipes.presets import preset_recipe
from tcaq.runs import Run

from .tiny import FAMILIES, conditions_of, pipeline_of

EVERY = pytest.mark.parametrize("name", FAMILIES)
LEARNED = ("ldm-vq", "sd", "sdxl", "dit", "pixart", "sd35", "flux-guided")
"""One of each kind of block."""
SEEDS = (1, 2)
SMALL = {
    "ranges": {"values": 500, "weight_candidates": 4, "input_candidates": 4},
    "reconstruction": {"iterations": 20, "inputs": 8, "batch": 4},
    "alignment": None,
    "network": {"iterations": 2, "inputs": 8, "batch": 4},
    "correction": {"strengths": []},
}


def recipe(name, program, **options):
    asked = conditions_of(name)
    calibration = {"images": 3, "steps": 2, "batch": 2} | (
        {} if asked is None else {"conditions": asked.model_dump(mode="json")}
    )
    options = {"ranges": SMALL["ranges"], "calibration": calibration} | options
    return preset_recipe(program, "full", **options)


def images_of(name, pipe, other=None):
    """Images of this test's seeds, under another scheduler if one is given."""
    conditions = resolve_conditions(pipe, conditions_of(name))
    pipe = use_scheduler(pipe, other)
    return sample(pipe, SEEDS, 4, conditions)


@EVERY
def test_range_search_through_disk(name, tmp_path):
    pipe = pipeline_of(name)
    conditions = resolve_conditions(pipe, conditions_of(name))
    _, trajectories = record(pipe, SEEDS, 2, conditions)
    expected = predict(find_denoiser(pipe)[1], trajectories)
    spec = recipe(name, "mse", weights=8, activations=8, step_groups="per-step")
    quantized = tcaq.quantize(pipe, spec, tmp_path)
    error = (predict(find_denoiser(quantized)[1], trajectories) - expected).square().mean() / expected.square().mean()
    assert 0 < float(error) < 0.02
    loaded = tcaq.load(tmp_path)
    assert type(loaded) is type(pipe)
    assert torch.equal(images_of(name, loaded), images_of(name, quantized))
    images = images_of(name, loaded, FAMILIES[name].other)
    assert images.shape == (2, 3, 16, 16)
    assert len(images.unique()) > 2


@pytest.mark.parametrize("name", LEARNED)
def test_reconstruction_lowers_losses_and_resumes(name, tmp_path):
    made = tcaq.quantize(pipeline_of(name), recipe(name, "tcaq", **SMALL), tmp_path)
    run = Run.read(tmp_path / "run")
    # layers at the ends and of the time embedding have 8 bits, too few errors for 20 iterations to mend
    losses = [part.meta for _, part in run.results("reconstruct/0") if "block" in str(part.meta["unit"])]
    assert sum(loss["loss_after"] for loss in losses) < sum(loss["loss_before"] for loss in losses)
    before = {str(path): path.read_bytes() for path in (tmp_path / "run" / "stages").rglob("*.safetensors")}
    again = tcaq.quantize(pipeline_of(name), recipe(name, "tcaq", **SMALL), tmp_path)
    assert before == {str(path): path.read_bytes() for path in (tmp_path / "run" / "stages").rglob("*.safetensors")}
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    images = images_of(name, loaded)
    assert torch.equal(images, images_of(name, made))
    kept, resumed = (find_denoiser(pipe)[1].state_dict() for pipe in (made, again))
    assert all(torch.equal(resumed[key], value) for key, value in kept.items())
    alone = AutoModel.from_pretrained(str(tmp_path), subfolder=FAMILIES[name].component)
    state = alone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in find_denoiser(loaded)[1].state_dict().items())
    assert sum(1 for _ in quantized_layers(alone)) == len(list(quantized_layers(find_denoiser(made)[1])))


@pytest.mark.parametrize(
    ("name", "dtype"), [("sd", torch.bfloat16), ("dit", torch.float16), ("flux", torch.bfloat16)], ids=str
)
def test_a_pipeline_in_half_precision_stays_in_it(name, dtype, tmp_path):
    small = {"reconstruction": {"iterations": 3, "inputs": 4, "batch": 2}, "alignment": None, "network": None}
    spec = recipe(name, "tcaq", weights=8, activations=8, **small, correction=None)
    pipeline_of(name, dtype).save_pretrained(tmp_path / "float")
    # from its file, as users have it: position tables that are stored in none are then float32
    made = tcaq.quantize(load_pipeline(str(tmp_path / "float")), spec, tmp_path / "w8a8")
    loaded = tcaq.load(tmp_path / "w8a8")
    assert {find_denoiser(loaded)[1].dtype, loaded.vae.dtype} == {dtype}
    assert torch.equal(images_of(name, loaded), images_of(name, made))
    assert f"torch_dtype={dtype}" in (tmp_path / "w8a8" / "README.md").read_text()
    conditions = resolve_conditions(loaded, conditions_of(name))
    original = load_pipeline(str(tmp_path / "float"))
    _, trajectories = record(original, SEEDS, 2, conditions)
    expected, actual = (predict(find_denoiser(pipe)[1], trajectories).float() for pipe in (original, loaded))
    assert float((actual - expected).square().mean() / expected.square().mean()) < 0.05


RELATED = ("minmax", "ptq4dm", "qdiffusion", "ptqd", "apqdm")


@pytest.mark.parametrize("program", RELATED)
def test_the_related_recipes_run_on_a_guided_transformer(program):
    name = "flux-guided"
    few = {"reconstruction": {"iterations": 2, "inputs": 4, "batch": 2}} if program in ("qdiffusion", "ptqd") else {}
    few |= {"grouping": {"iterations": 2, "inputs": 4, "batch": 2, "groups": 2}} if program == "apqdm" else {}
    pipe = pipeline_of(name)
    conditions = resolve_conditions(pipe, conditions_of(name))
    _, trajectories = record(pipe, SEEDS, 2, conditions)
    expected = predict(find_denoiser(pipe)[1], trajectories)
    made = tcaq.quantize(pipe, recipe(name, program, weights=8, activations=8, **few))
    actual = predict(find_denoiser(made)[1], trajectories)
    assert float((actual - expected).square().mean() / expected.square().mean()) < 0.05


@pytest.mark.parametrize("name", ["dit", "flux-guided"])
def test_error_feedback_is_the_same_with_conditions_and_activations_on_disk(name, tmp_path):
    made = []
    for memory in (1.0, 1e-9):
        spec = recipe(name, "mse", activations=8, gptq={"inputs": 4, "batch": 2}, memory=memory)
        made.append(tcaq.quantize(pipeline_of(name), spec, tmp_path / f"{memory}"))
    one, other = (find_denoiser(pipe)[1].state_dict() for pipe in made)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    records = [record for _, record in Run.read(tmp_path / "1e-09" / "run").results("round")]
    errors = [error for record in records for error in record.meta["errors"].values()]
    assert sum(error["gptq"] <= error["nearest"] for error in errors) > 0.8 * len(errors)
