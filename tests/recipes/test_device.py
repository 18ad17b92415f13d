"""Quantizing where the model is: on a device that shares no tensor with the CPU, and with the same outcome to the bit."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcaq.models.device import following
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize
from tcaq.runs import Run
from tcaq.spec.recipe import Recipe
from tests.conftest import build_pipeline
from tests.elsewhere import available, elsewhere

SIZES = {
    "calibration": {"images": 2, "steps": 2, "batch": 2},
    "ranges": {"values": 100, "weight_candidates": 2, "input_candidates": 2},
    "reconstruction": {"iterations": 1, "inputs": 4, "batch": 2},
    "grouping": {"groups": 2, "iterations": 1, "inputs": 4, "batch": 2},
    "alignment": {"rounds": 1, "iterations": 1},
    "network": {"iterations": 1, "inputs": 4, "batch": 2},
}
CHANNELS = (8, 16)
"""Two levels: each operation of such a device goes through Python."""
FOLLOWING = {
    "tcaq": ("network", "collect/3", "collect/4", "collect/5", "correct"),
    "apqdm": ("group", "scale", "select"),
}
"""What a gradient through the whole denoiser, or sums over all of it, decide: a device adds in another order."""
RUNS = {  # whose stages are those of all recipes
    "tcaq": {},
    "tfmqdm": {},
    "apqdm": {},
    "mse": {"gptq": {"inputs": 4, "batch": 2}},
    "minmax": {"step_groups": "per-step", "mixed": {"bits": [4, 8]}},
}


def recipe_of(program: str) -> Recipe:
    whole = preset_recipe(program, "full")
    sizes = {part: size for part, size in SIZES.items() if getattr(whole, part) is not None}
    return whole.changed(sizes | RUNS[program])


def quantize_elsewhere(folder: Path) -> None:
    with elsewhere() as device, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention adds in another order
        for program in RUNS:
            pipe = quantize(build_pipeline(CHANNELS).to(device), recipe_of(program), folder / program)
            if {tensor.device for tensor in pipe.unet.state_dict().values()} != {device}:
                raise RuntimeError(f"{program} left tensors on the CPU")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process that has such a device quantized by every recipe."""
    if not available():
        pytest.skip("this PyTorch cannot make a device in Python")
    folder = tmp_path_factory.mktemp("elsewhere")
    process = get_context("spawn").Process(target=quantize_elsewhere, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("program", RUNS)
def test_every_record_is_the_same_to_the_bit(there, tmp_path, program):
    with sdpa_kernel(SDPBackend.MATH):
        quantize(build_pipeline(CHANNELS), recipe_of(program), tmp_path / program)
    ours, others = (Run.read(folder / program / "run") for folder in (tmp_path, there))
    assert ours.finished() == others.finished()
    exact = [name for name in ours.finished() if not name.startswith(FOLLOWING.get(program, ()))]
    assert exact
    for name in exact:
        for (item, mine), (_, other) in zip(ours.results(name), others.results(name), strict=True):
            assert mine.tensors.keys() == other.tensors.keys()
            for key, value in mine.tensors.items():
                torch.testing.assert_close(other.tensors[key], value, rtol=0, atol=0, msg=f"{name} {item} {key}")


def test_random_numbers_of_the_cpu_are_its_own_and_others_follow():
    generator = torch.Generator().manual_seed(3)
    assert following(generator, torch.device("cpu")) is generator
    if torch.cuda.is_available():
        seeds = [following(generator, torch.device("cuda")).initial_seed() for _ in range(2)]
        assert seeds[0] != seeds[1]
