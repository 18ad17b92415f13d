"""`tcaq compare` on a tiny local pipeline."""

from __future__ import annotations

import json
import shutil

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


def test_the_same_checkpoints_in_integers_are_another_protocol(done, tmp_path):
    root, _ = done
    refused = compare(root, "--execution", "integer")
    assert refused.exit_code == 2
    assert "execution None there, 'integer' now" in refused.output
    copied = tmp_path / "copied"
    shutil.copytree(root, copied)
    (copied / "out" / "compare.json").unlink()
    result = compare(copied, "--execution", "integer")
    assert result.exit_code == 0, result.output
    assert "quantized layers run in integers" in result.output
    pair = [json.loads((at / "out" / "compare.json").read_text()) for at in (root, copied)]
    assert pair[1]["protocol"] == pair[0]["protocol"] | {"model": str(copied / "float"), "execution": "integer"}
    for fake, integer in zip(*(results["cells"] for results in pair), strict=True):
        scores = [cell["seeds"]["1"]["evaluation"] for cell in (fake, integer)]
        assert scores[1]["paired"]["psnr"] == pytest.approx(scores[0]["paired"]["psnr"], abs=0.5)
        assert scores[1]["quantized"] != scores[0]["quantized"]
        assert scores[1]["float"] == pytest.approx(scores[0]["float"])


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


@pytest.fixture
def measured(tmp_path):
    """A comparison of one cell, as far as the record goes."""
    recipe = preset_recipe("minmax", "fast", weights=8, activations=8)
    (tmp_path / "own.json").write_text(recipe.model_dump_json())
    given = ["compare", "reference", "--output", str(tmp_path / "out"), "--bits", "w8a8", "--num", "16", "--steps", "2"]
    return tmp_path, lambda *more: RUNNER.invoke(app, [*given, *map(str, more)])


def as_if_measured(monkeypatch):
    """Cells count as measured without any work."""
    monkeypatch.setattr("tcaq.cli.compare.measure", lambda *_: {})
    monkeypatch.setattr("tcaq.cli.compare.finish", lambda *_: None)


@pytest.mark.parametrize("more", [["--real", "data"], ["--plan", "author"]])
def test_what_only_one_call_was_asked_for_is_another_protocol(measured, monkeypatch, more):
    root, call = measured
    as_if_measured(monkeypatch)
    assert call("--recipes", root / "own.json", *more).exit_code == 0
    refused = call("--recipes", root / "own.json")
    assert refused.exit_code == 2
    assert f"{more[0].removeprefix('--')} '{more[1]}' there, None now" in " ".join(refused.output.split())
    assert call("--recipes", root / "own.json", *more).exit_code == 0


def test_a_recipe_that_was_edited_is_not_taken_for_the_measured_one(measured, monkeypatch):
    root, call = measured
    as_if_measured(monkeypatch)
    assert call("--recipes", root / "own.json").exit_code == 0
    (root / "own.json").write_text(preset_recipe("minmax", "fast", ranges={"power": 3.0}, seed=7).model_dump_json())
    refused = call("--recipes", root / "own.json")
    assert refused.exit_code == 2
    assert "own at w8a8 was measured with other ranges;" in " ".join(refused.output.split())  # the seed is the cell's


def test_a_plan_that_was_edited_is_not_taken_for_the_measured_one(measured, monkeypatch):
    root, call = measured
    as_if_measured(monkeypatch)
    for reason in ("this", "that"):
        (root / "plan.json").write_text(json.dumps({"rules": [{"match": "*", "reason": reason}]}))
        result = call("--recipes", "minmax", "--plan", root / "plan.json")
    assert result.exit_code == 2
    assert "minmax at w8a8 was measured with other rules;" in " ".join(result.output.split())


def test_two_cells_of_one_name_are_refused(measured):
    root, call = measured
    (root / "minmax.json").write_text((root / "own.json").read_text())
    for recipes in (f"minmax,{root / 'minmax.json'}", "mse,mse"):
        refused = call("--recipes", recipes)
        assert refused.exit_code == 2
        assert "two cells are" in " ".join(refused.output.split())


def test_a_preset_is_for_recipes_that_are_named(measured, monkeypatch):
    root, call = measured
    as_if_measured(monkeypatch)
    refused = call("--recipes", root / "own.json", "--preset", "fast")
    assert refused.exit_code == 2
    assert "leave --preset out" in " ".join(refused.output.split())
    assert call("--recipes", f"{root / 'own.json'},minmax", "--preset", "fast").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipes", "tcak"], "unknown recipe 'tcak'"),
        (["--bits", "8"], "--bits '8': give widths like w4a8"),
        (["--bits", "w9a4"], "weights"),
        (["--bits", ""], "--bits ''"),
        (["--seeds", "1,1"], "--seeds '1,1'"),
        (["--num", "17"], "images 16 there, 17 now"),
    ],
)
def test_wrong_usage_is_answered_before_anything_runs(done, options, said):
    root, _ = done
    result = compare(root, *options)
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", "")
