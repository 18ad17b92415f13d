"""`tcaq compare` on a tiny local pipeline."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tcaq.cli import app
from tcaq.recipes.presets import preset_recipe
from tcaq.runs import Run

RUNNER = CliRunner()
SIZES = {"calibration": {"images": 2, "steps": 2}, "ranges": {"values": 200}}


def compare(root, *more: str):
    recipes = ",".join(str(root / f"{name}.json") for name in ("minmax", "mse"))
    options = ["--recipes", recipes, "--bits", "w8a8,w4a4", "--num", "16", "--steps", "2"]
    features = ["--features", "tests.cli.test_verbs:Pixels"]
    return RUNNER.invoke(
        app, ["compare", str(root / "float"), "--output", str(root / "out"), *options, *features, *more]
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from tests.conftest import build_pipeline

    root = tmp_path_factory.mktemp("compare")
    build_pipeline().save_pretrained(root / "float")
    for name in ("minmax", "mse"):
        (root / f"{name}.json").write_text(preset_recipe(name, "fast", **SIZES).model_dump_json())
    result = compare(root)
    assert result.exit_code == 0, result.output
    return root, result


def test_every_cell_is_measured_by_one_protocol(done):
    root, result = done
    results = json.loads((root / "out" / "compare.json").read_text())
    found = {(cell["recipe"], cell["bits"]): cell["seeds"]["1"] for cell in results["cells"]}
    assert list(found) == [("minmax", "w8a8"), ("mse", "w8a8"), ("minmax", "w4a4"), ("mse", "w4a4")]
    floats = [cell["evaluation"]["float"] for cell in found.values()]
    assert floats == [floats[0]] * 4  # the float model is sampled once
    assert found["mse", "w8a8"]["evaluation"]["paired"]["psnr"] > found["mse", "w4a4"]["evaluation"]["paired"]["psnr"]
    assert found["mse", "w4a4"]["weight_bytes"] < found["mse", "w8a8"]["weight_bytes"]
    assert all(cell["quantize_seconds"] > 0 and cell["quantize_peak_memory"] > 2**20 for cell in found.values())
    table, page = (root / "out" / "compare.md").read_text(), (root / "out" / "compare.html").read_text()
    assert table.count("| mse | W4A4 |") == 1
    assert page.count("<img") == 6  # float and two recipes at two widths
    assert "mse" in result.stdout
    for bits in ("w8a8", "w4a4"):
        with Image.open(root / "out" / f"samples-{bits}.png") as picture:
            assert picture.height > 3 * 2 * 8  # float and two recipes, in pixels of twice the size


def test_trajectories_are_sampled_once_and_shared(done):
    root, _ = done
    shared = list((root / "out" / "trajectories").iterdir())
    assert len(shared) == 1  # both recipes calibrate alike
    kept = next(record for _, record in Run.read(shared[0]).results("collect"))
    for folder in (root / "out" / "cells").iterdir():
        own = next(record for _, record in Run.read(folder / "run").results("collect/0"))
        assert all(torch.equal(own.tensors[name], value) for name, value in kept.tensors.items())


def test_it_goes_on_where_it_stopped(done, monkeypatch):
    root, _ = done
    before = (root / "out" / "compare.json").read_bytes()
    results = json.loads(before)
    results["cells"][1]["seeds"] = {}
    (root / "out" / "compare.json").write_text(json.dumps(results))
    result = compare(root)
    assert result.exit_code == 0, result.output
    assert result.stderr.count(", seed 1") == 1
    again, first = json.loads((root / "out" / "compare.json").read_text()), json.loads(before)
    for a, b in zip(again["cells"], first["cells"], strict=True):
        assert a["seeds"]["1"]["evaluation"] == b["seeds"]["1"]["evaluation"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "tcak"], "unknown recipe 'tcak'"),
        (["--bits", "8"], "--bits '8': give widths like w4a8"),
        (["--bits", "w9a4"], "weights"),
        (["--seeds", "1,1"], "--seeds '1,1'"),
        (["--num", "17"], "images 16 there, 17 now"),
    ],
)
def test_wrong_usage_is_answered_before_anything_runs(done, options, said):
    root, _ = done
    result = compare(root, *options)
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", "")
