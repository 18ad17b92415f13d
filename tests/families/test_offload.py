"""Pipelines whose weights accelerate moves: what it does with a device is done here with the CPU as that device."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import AutoModel

import tcaq
from tcaq.errors import ModelError, UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import weights_hash
from tcaq.models.offload import bring_back, is_offloaded
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import sample
from tcaq.models.trajectories import predict
from tcaq.recipes.presets import preset_recipe

from .quantized import quantized_of
from .tiny import conditions_of, pipeline_of

NAMES = pytest.mark.parametrize("name", ["dit", "flux"])
HOWS = pytest.mark.parametrize("how", ["model", "sequential"])
SEEDS = (1, 2)


def images(name, pipe):
    return sample(pipe, SEEDS, 2, resolve_conditions(pipe, conditions_of(name)))


def recipe(name, **options):
    calibration = {"images": 2, "steps": 1, "batch": 2, "conditions": conditions_of(name).model_dump(mode="json")}
    ranges = {"values": 200, "weight_candidates": 2, "input_candidates": 2}
    return preset_recipe(
        "tcaq", "full", calibration=calibration, ranges=ranges, alignment=None, correction=None, **options
    )


FIT = {
    "reconstruction": {"iterations": 2, "inputs": 4, "batch": 2},
    "network": {"iterations": 1, "inputs": 4, "batch": 2},
}


def offload(pipe, how):
    """What diffusers does to move whole components, or the denoiser piece by piece.

    It would do the latter to text encoders, too: transformers' tied weights cannot be brought back to the CPU as a device.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        cpu_offload(find_denoiser(pipe)[1], torch.device("cpu"), offload_buffers=False)
    assert is_offloaded(find_denoiser(pipe)[1]) is (how == "sequential")


@NAMES
@HOWS
def test_a_quantized_pipeline_samples_the_same_while_it_is_offloaded(name, how):
    pipe, _ = quantized_of(name)
    expected = images(name, pipe)
    own = own_parts(pipe)
    offload(own, how)
    assert torch.equal(images(name, own), expected)


def own_parts(pipe):
    """A copy: hooks must not stay on what other tests use."""
    return type(pipe)(**{key: copy.deepcopy(part) for key, part in pipe.components.items()})


@NAMES
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_codes_are_offloaded_too(name, where, tmp_path):
    pipe, trajectories = quantized_of(name)
    denoiser = find_denoiser(pipe)[1]
    expected = predict(denoiser, trajectories)
    before = weights_hash(denoiser)
    if where == "memory":
        cpu_offload(denoiser, torch.device("cpu"), offload_buffers=True)
    else:
        places = {child: "disk" if i % 2 else "cpu" for i, (child, _) in enumerate(denoiser.named_children())}
        places |= {key: "cpu" for key in denoiser.state_dict() if "." not in key}
        dispatch_model(
            denoiser, places, main_device="cpu", offload_dir=tmp_path, offload_buffers=True, force_hooks=True
        )
    assert any(layer.qweight.is_meta for _, layer in quantized_layers(denoiser) if hasattr(layer, "qweight"))
    assert torch.equal(predict(denoiser, trajectories), expected)
    assert torch.equal(images(name, pipe), images(name, quantized_of(name)[0]))
    assert weights_hash(denoiser) == before


@HOWS
def test_calibration_under_offloading_gives_the_same_model(how, tmp_path):
    expected = find_denoiser(tcaq.quantize(pipeline_of("dit"), recipe("dit", **FIT)))[1].state_dict()
    pipe = pipeline_of("dit")
    offload(pipe, how)
    made = tcaq.quantize(pipe, recipe("dit", **FIT), tmp_path)
    found = find_denoiser(made)[1].state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(images("dit", tcaq.load(tmp_path)), images("dit", made))


def test_a_device_map_places_a_checkpoint_and_the_disk_is_refused(tmp_path):
    pipe, trajectories = quantized_of("dit")
    pipe.transformer.save_pretrained(tmp_path)
    placed = AutoModel.from_pretrained(str(tmp_path), device_map={"": "cpu"})
    assert torch.equal(predict(placed, trajectories), predict(pipe.transformer, trajectories))
    with pytest.raises(UsageError, match="on disk"):
        AutoModel.from_pretrained(str(tmp_path), device_map={"": "disk"}, offload_folder=tmp_path / "off")


def test_weights_that_were_never_loaded_are_said():
    pipe = pipeline_of("dit")
    pipe.transformer.to("meta")
    with pytest.raises(ModelError, match="weights of the DiTTransformer2DModel are on disk alone"):
        bring_back(pipe)


def test_calibration_with_parts_on_another_device_is_refused():
    pipe = pipeline_of("dit")
    add_hook_to_module(pipe.vae, AlignDevicesHook(execution_device="meta"))
    with pytest.raises(ModelError, match=r"vae is moved to meta for each call.*remove_all_hooks"):
        tcaq.quantize(pipe, recipe("dit"))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_calibration_of_parts_in_different_places_is_refused(part, monkeypatch):
    pipe = pipeline_of("dit")
    places = {pipe.transformer: {"cpu"}, pipe.vae: {"cpu"}} | {getattr(pipe, part): {"cuda"}}
    monkeypatch.setattr("tcaq.models.offload.devices_of", lambda module: places.get(module, set()))
    with pytest.raises(ModelError, match=rf"different devices \(.*{part} on cuda.*pipe\.to"):
        tcaq.quantize(pipe, recipe("dit"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator to calibrate on")
@NAMES
def test_calibration_on_an_accelerator(name):
    pipe = tcaq.quantize(pipeline_of(name).to("cuda"), recipe(name, **FIT))
    assert {tensor.device.type for tensor in find_denoiser(pipe)[1].state_dict().values()} == {"cuda"}
    assert torch.isfinite(images(name, pipe).float()).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator to offload from")
@NAMES
@HOWS
def test_offloading_from_an_accelerator(name, how):
    pipe, _ = quantized_of(name)
    expected, own = images(name, pipe), own_parts(pipe)
    getattr(own, f"enable_{how}_cpu_offload")()
    difference = (images(name, own).short() - expected.short()).abs()
    assert (difference <= 2).double().mean() > 0.95
