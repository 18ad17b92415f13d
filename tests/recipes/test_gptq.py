"""GPTQ in recipes: a stage of its own, off by default, resumable, and a start for reconstruction."""

from __future__ import annotations

import pytest
import torch

import tcaq
from tcaq.cli.options import WeightRounding, make_recipe
from tcaq.layers.insert import quantized_layers
from tcaq.layers.split import SplitConv2d
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.packing import unpack
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize
from tcaq.runs import Run
from tcaq.spec.recipe import Recipe

SMALL = {
    "calibration": {"images": 4, "steps": 3, "batch": 2},
    "ranges": {"values": 500, "weight_candidates": 4, "input_candidates": 4},
    "gptq": {"inputs": 8, "batch": 4},
}


def small(program: str = "mse", preset: str = "fast", **options) -> Recipe:
    return preset_recipe(program, preset, **{**SMALL, **options})


def test_it_is_off_by_default_and_leaves_no_trace_there():
    assert Recipe().gptq is None
    assert "gptq" not in Recipe().model_dump(mode="json")
    on = Recipe().changed({"gptq": {}})
    assert on.model_dump(mode="json")["gptq"]["damping"] == 0.01
    assert Recipe.parse(on.model_dump(mode="json"), "there and back") == on
    assert on.changed({"gptq": None}) == Recipe()


def test_the_command_line_switches_it():
    options = dict.fromkeys(("weights", "activations", "steps", "samples", "step_groups", "rounds", "memory"))
    made = {
        rounding: make_recipe("mse", "fast", seed=0, weight_rounding=rounding, **options)
        for rounding in (None, *WeightRounding)
    }
    assert made[None] == made[WeightRounding.NEAREST]
    assert made[WeightRounding.GPTQ] == made[None].changed({"gptq": {}})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two undisturbed quantizations by name of the recipe; the second has split layers."""
    from tests.conftest import build_pipeline

    root = tmp_path_factory.mktemp("gptq")
    return root, {name: quantize(build_pipeline(), small(name), root / name) for name in ("mse", "qdiffusion")}


@pytest.mark.parametrize("program", ["mse", "qdiffusion"])
def test_every_weight_errs_less_in_its_products(program, done):
    folder, pipe = done[0] / program, done[1][program]
    run = Run.read(folder / "run")
    assert "reconstruct/0" not in run.finished()
    errors = {
        f"{unit}.{layer}": error
        for unit, record in run.results("round")
        for layer, error in record.meta["errors"].items()
    }
    weights = [layer for _, layer in quantized_layers(pipe.unet) if isinstance(layer, QuantizedWeight)]
    assert len(errors) == len(weights)
    better = sum(error["gptq"] <= error["nearest"] for error in errors.values())
    assert better > 0.9 * len(errors)  # a weight that one code clips can be the worse for it
    split = sum(isinstance(module, SplitConv2d) for module in pipe.unet.modules())
    assert bool(split) is (program == "qdiffusion")
    assert run.identity["recipe"]["gptq"]["inputs"] == 8
    loaded = tcaq.load(folder)
    for (name, one), other in zip(pipe.unet.state_dict().items(), loaded.unet.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_stopped_in_the_middle_it_goes_on_to_the_same_bytes(done, tiny_pipeline, tmp_path):
    class StopError(Exception):
        pass

    def stop(name, done, total, resumed):
        if (name, done, resumed) == ("round", 9, False):
            raise StopError

    with pytest.raises(StopError):
        quantize(tiny_pipeline(), small(), tmp_path, on_progress=stop)
    quantize(tiny_pipeline(), small(), tmp_path)
    one, other = (
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
        for folder in (tmp_path, done[0] / "mse")
    )
    assert one == other


def test_reconstruction_begins_at_the_roundings_found(tiny_pipeline, tmp_path):
    """With a rate of next to nothing the codes stay GPTQ's, save those beyond a weight's two neighbours."""
    still = {"iterations": 1, "inputs": 8, "batch": 4, "rounding_rate": 1e-9, "scale_rate": 0.0, "drop": 0.0}
    options = {"reconstruction": still, "network": None, "alignment": None, "correction": None}
    quantize(tiny_pipeline(), small("tcaq", "full", **options), tmp_path / "out")
    run, unet = Run.read(tmp_path / "out" / "run"), tiny_pipeline().unet
    vectors, scales = (dict(run.results(name))[name].tensors for name in ("equalize", "scale/weights"))
    fitted, kept, beyond = dict(run.results("reconstruct/0")), 0, 0
    for unit, record in run.results("round"):
        for layer, packed in record.tensors.items():
            name = f"{unit}.{layer}".rstrip(".")
            weight = unet.get_submodule(name).weight.detach()
            rows = (-1, *[1] * (weight.dim() - 1))
            scale, zero = (scales[f"{name}|{field}"].reshape(rows) for field in ("scale", "zero_point"))
            r = vectors.get(name, torch.ones(weight.shape[1])).reshape(1, *rows[:-1])
            bits = packed.numel() * 8 // weight.numel()
            found, after = (
                unpack(codes, bits, weight.shape)
                for codes in (packed, fitted[unit].tensors[f"{layer}|weight_quantizer.codes"])
            )
            below = torch.floor(weight * r / scale) + zero
            expected = found.float().maximum(below).minimum(below + 1).clamp(0, 2**bits - 1)
            assert torch.equal(after.float(), expected), name
            beyond += int((found != after).sum())
            kept += int((found == after).sum())
    assert 0 < beyond < 0.2 * kept
