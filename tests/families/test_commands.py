"""The commands on conditional pipelines: options reach the pipeline and the record, and what is wrong is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from tcaq.cli import app
from tcaq.evaluate.sampling import sample_for_evaluation
from tcaq.models.load import load_pipeline, stored_dtype
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.recipes.presets import preset_recipe
from tcaq.spec.conditions import PROMPTS, Conditions

from .tiny import pipeline_of

RUNNER = CliRunner()


def invoke(*args: object):
    return RUNNER.invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text-to-image pipeline on disk, a file of prompts, and a quantization by the command."""
    root = tmp_path_factory.mktemp("commands")
    pipeline_of("sd").save_pretrained(root / "float")
    (root / "prompts.txt").write_text("cat\n\n dog \nsea\n")
    result = invoke(
        "quantize", root / "float", "--output", root / "w8", "--preset", "fast", "--samples", 4, "--steps", 2, "--batch", 3,
        "--weights", 8, "--activations", 8, "--prompts", root / "prompts.txt", "--negative", "bad", "--guidance", 3.5,
        "--size", "16x24", "--linear-inputs", "token", "--no-correction", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root, json.loads(result.stdout)


def test_what_was_asked_for_is_part_of_the_recipe_and_of_the_trajectories(folders):
    root, summary = folders
    asked = summary["recipe"]["calibration"]["conditions"]
    assert asked["prompts"] == ["cat", "dog", "sea"]
    assert (asked["negative"], asked["guidance"], asked["height"], asked["width"]) == ("bad", 3.5, 16, 24)
    assert summary["recipe"]["linear_inputs"] == "token"
    recorded = load_file(root / "w8" / "run" / "stages" / "collect" / "0" / "000-batch-0.safetensors")
    assert recorded["samples"].shape == (4, 3, 4, 8, 12)  # two calls a step, latents of 16 x 24 pixels
    assert recorded["images"].shape == (3, 3, 16, 24)
    second = load_file(root / "w8" / "run" / "stages" / "collect" / "0" / "001-batch-1.safetensors")
    text = "given|encoder_hidden_states|1"
    torch.testing.assert_close(second[text][0], recorded[text][0])  # the fourth image has the first prompt again
    identity = json.loads((root / "w8" / "run" / "run.json").read_text())["identity"]
    assert set(identity["conditioners"]) == {"text_encoder"}


def test_sample_takes_prompts_and_another_scheduler(folders, tmp_path):
    root, _ = folders
    options = ["--num", 2, "--steps", 3, "--prompts", root / "prompts.txt", "--size", 16, "--seed", 4]
    assert invoke("sample", root / "float", *options, "--output", tmp_path / "own").exit_code == 0
    pipe = pipeline_of("sd")
    conditions = resolve_conditions(pipe, Conditions(prompts=("cat", "dog", "sea"), height=16, width=16))
    expected = sample(pipe, image_seeds("sample", 4, 0, 2), 3, conditions)
    with Image.open(tmp_path / "own" / "00001.png") as image:
        assert np.array_equal(np.asarray(image), expected[1].permute(1, 2, 0).numpy())
    other = ["--scheduler", "EulerDiscreteScheduler"]
    assert invoke("sample", root / "w8", *options, *other, "--output", tmp_path / "euler").exit_code == 0
    with Image.open(tmp_path / "euler" / "00001.png") as image:
        assert not np.array_equal(np.asarray(image), expected[1].permute(1, 2, 0).numpy())


def test_evaluate_under_both_schedulers_keeps_their_images_apart(folders, tmp_path):
    root, _ = folders
    np.savez(tmp_path / "real.npz", mean=np.zeros(4), covariance=np.eye(4))
    options = [
        "evaluate", root / "w8", "--reference", root / "float", "--num", 3, "--steps", 2, "--batch", 2, "--size", 16,
        "--prompts", root / "prompts.txt", "--features", "tests.cli.test_verbs:Pixels", "--real", tmp_path / "real.npz",
    ]  # fmt: skip
    found = []
    for more in ([], ["--scheduler", "DPMSolverMultistepScheduler"]):
        result = invoke(*options, *more, "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / "out.json").read_text())["paired"])
    own, other = found
    assert [row["timestep"] for row in own["sqnr_per_step"]] == [
        501,
        1,
    ]  # a row a step, not one for each half of guidance
    assert all(row["sqnr"] > 15 for row in own["sqnr_per_step"])
    assert own["psnr"] != other["psnr"]


def test_recipes_are_compared_under_the_conditions_asked_for(folders, tmp_path):
    root, _ = folders
    np.savez(tmp_path / "real.npz", mean=np.zeros(4), covariance=np.eye(4))
    recipe = preset_recipe("minmax", "fast", calibration={"images": 2, "steps": 2}, ranges={"values": 200})
    (tmp_path / "short.json").write_text(recipe.model_dump_json())
    asked = ["--prompts", root / "prompts.txt", "--guidance", 3.5, "--size", 16]
    result = invoke(
        "compare", root / "float", "--output", tmp_path / "out", "--recipes", tmp_path / "short.json", "--bits", "w8a8",
        "--num", 16, "--steps", 2, "--features", "tests.cli.test_verbs:Pixels", "--real", tmp_path / "real.npz", *asked,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert results["protocol"]["conditions"]["guidance"] == 3.5
    assert results["cells"][0]["seeds"]["1"]["evaluation"]["ratio"]["fd"] > 0  # --real is what distances are to
    runs = [*(tmp_path / "out" / "cells").glob("*/run/run.json"), *(tmp_path / "out" / "samples").glob("*/run.json")]
    identities = [json.loads(path.read_text())["identity"] for path in runs]
    found = [who.get("conditions") or who["recipe"]["calibration"]["conditions"] for who in identities]
    assert len(found) == 3  # the calibration, and evaluation images of both models
    assert all((c["prompts"], c["guidance"], c["height"]) == (["cat", "dog", "sea"], 3.5, 16) for c in found)


def test_evaluation_without_conditions_takes_the_defaults(tmp_path):
    pipe = pipeline_of("dit")
    found = sample_for_evaluation(pipe, tmp_path, num=2, steps=1, seed=0, batch=2)
    asked = resolve_conditions(pipe)
    assert torch.equal(found.images, sample(pipe, image_seeds("evaluation", 0, 0, 2), 1, asked))
    (work,) = tmp_path.iterdir()
    identity = json.loads((work / "run.json").read_text())["identity"]
    assert identity["conditions"]["labels"] == list(asked.labels)


def test_plan_shows_token_grids(folders):
    root, _ = folders
    rows = json.loads(invoke("plan", root / "float", "--linear-inputs", "token", "--json").stdout)["layers"]
    codes = {row["name"]: row["inputs"][0]["code"] for row in rows}
    assert codes["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"] == "token"
    assert codes["down_blocks.1.resnets.0.conv1"] == codes["time_embedding.linear_1"] == "affine"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["sample", "{float}", "--output", "o", "--labels", "3"], 2, "takes no class_labels"),
        (["sample", "{float}", "--output", "o", "--size", "big"], 2, "--size 'big'"),
        (["sample", "{float}", "--output", "o", "--labels", "a"], 2, "--labels 'a'"),
        (["sample", "{float}", "--output", "o", "--prompts", "absent.txt"], 2, "absent.txt"),
        (["sample", "{float}", "--output", "o", "--scheduler", "BestScheduler"], 2, "has none of that name"),
        (
            ["sample", "{float}", "--output", "o", "--scheduler", "FlowMatchEulerDiscreteScheduler"],
            2,
            "of flow matching",
        ),
        (["quantize", "{float}", "--output", "o", "--linear-inputs", "row"], 2, "linear_inputs"),
        (["quantize", "reference", "--output", "o", "--guidance", "2"], 2, "takes no guidance_scale"),
    ],
)
def test_wrong_use_says_so(folders, args, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*(arg.format(float=folders[0] / "float") for arg in args))
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())


@pytest.mark.parametrize("verb", ["quantize", "sample"])
def test_classes_that_the_model_has_not_are_refused(tmp_path, verb):
    pipeline_of("dit").save_pretrained(tmp_path / "dit")
    result = invoke(verb, tmp_path / "dit", "--output", tmp_path / "o", "--labels", "3,1000,9999")
    assert result.exit_code == 2, result.output
    assert "--labels 1000,9999: the model has classes 0 to 999" in " ".join(result.output.split())


def test_an_unreachable_hub_is_named():
    command = [sys.executable, "-m", "tcaq", "plan", "some/model"]
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "some/model" in said
    assert "http://127.0.0.1:9" in said
    assert "Traceback" not in said


def test_a_checkpoint_is_loaded_in_its_own_dtype(tmp_path):
    pipeline_of("dit", torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_pipeline(str(tmp_path / "half")).transformer.dtype == torch.bfloat16
    assert load_pipeline(str(tmp_path / "half"), torch.float32).transformer.dtype == torch.float32
    pipeline_of("ldm-kl", torch.float16).save_pretrained(tmp_path / "ldm")
    assert stored_dtype(tmp_path / "ldm") == torch.float32  # its pipeline runs in nothing else


def test_without_a_file_the_prompts_are_the_built_in_ones():
    assert resolve_conditions(pipeline_of("sd")).prompts == PROMPTS
    assert resolve_conditions(pipeline_of("sd")).guidance == 7.5
    assert resolve_conditions(pipeline_of("dit")).labels == tuple(i * 1000 // 16 for i in range(16))
    assert resolve_conditions(pipeline_of("ldm-kl")) is None
