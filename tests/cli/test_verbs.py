"""The commands on a tiny local pipeline: results, exit codes, and what is said when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tcaq.cli import app
from tcaq.cli.options import make_recipe
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.recipes.presets import preset_recipe

RUNNER = CliRunner()


class Pixels(nn.Module):
    """A feature extractor for these tests: mean and spread of an image's quarters."""

    num_features = 4

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.float().mean(1)
        return torch.stack([values[:, i::2, j::2].mean((1, 2)) for i in (0, 1) for j in (0, 1)], 1)


class Narrow(Pixels):
    """An extractor that no image of these tests fits."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(len(images), 7)


def invoke(*args: object):
    return RUNNER.invoke(app, [str(a) for a in args])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float pipeline on disk and its quantization by the command."""
    from tests.conftest import build_pipeline

    root = tmp_path_factory.mktemp("cli")
    build_pipeline().save_pretrained(root / "float")
    result = invoke(*quantization(root), "--json")
    assert result.exit_code == 0, result.output
    return root, json.loads(result.stdout)


def quantization(root: Path) -> list[object]:
    return [
        "quantize", root / "float", "--output", root / "w4a4", "--preset", "fast", "--samples", 2, "--steps", 3,
        "--weights", 4, "--activations", 6, "--step-groups", 2, "--seed", 5,
    ]  # fmt: skip


def test_quantize_obeys_its_options_and_resumes(folders):
    root, summary = folders
    assert summary["recipe"]["activations"] == 6
    assert summary["recipe"]["step_groups"] == 2
    assert summary["recipe"]["calibration"] == {"images": 2, "steps": 3, "batch": 32, "law": {"kind": "even"}}
    assert (root / "w4a4" / "model_index.json").is_file()
    again = invoke(*quantization(root), "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["seconds"] == summary["seconds"]  # nothing was computed twice


@pytest.mark.parametrize("verb", ["quantize", "sample", "evaluate", "report", "compare"])
def test_verbs_that_sample_say_what_conditional_models_are_asked_for_by_default(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = invoke(verb, "--help").stdout
    assert all(f"--{name}" in said for name in ("prompts", "negative", "guidance", "size", "tokens", "pictures"))
    assert "Class numbers, with commas between. [default: (16, evenly)]" in " ".join(said.replace("│", " ").split())


def test_iterations_are_those_of_the_first_round_alone():
    preset, asked = (
        make_recipe("tcaq", "full", weights=None, activations=None, iterations=iterations) for iterations in (None, 7)
    )
    assert asked.reconstruction.iterations == 7
    assert asked == preset.changed({"reconstruction": {"iterations": 7}})


def test_a_recipe_file_keeps_what_no_option_changes(tmp_path):
    own = preset_recipe("minmax", "fast", seed=7, layers="author", weights=6)
    (tmp_path / "own.json").write_text(own.model_dump_json())
    assert make_recipe(str(tmp_path / "own.json"), None, weights=None, activations=None) == own
    changed = make_recipe(str(tmp_path / "own.json"), None, weights=None, activations=None, seed=0, plan="same")
    assert changed == own.changed({"seed": 0, "layers": "same"})
    refused = invoke("quantize", "reference", "--output", "o", "--recipe", tmp_path / "own.json", "--preset", "full")
    assert refused.exit_code == 2
    assert "leave --preset out" in " ".join(refused.output.split())


def test_plan_prints_the_table_without_running(folders):
    root, _ = folders
    result = invoke("plan", root / "float", "--weights", 3, "--activations", 5, "--json")
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    assert rows["mid_block.resnets.0.conv1"]["weight"]["bits"] == 3
    assert rows["mid_block.resnets.0.conv1"]["inputs"][0]["bits"] == 5
    assert rows["conv_in"]["weight"]["bits"] == 8
    assert "conv_in" in invoke("plan", root / "float").stdout


def test_plan_cuts_no_name_however_narrow_the_terminal(folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    said = invoke("plan", folders[0] / "float").stdout
    assert "…" not in said


def test_plan_takes_step_groups_where_a_recipe_has_one(folders):
    command = ("plan", folders[0] / "float", "--recipe", "minmax", "--step-bits", "4,8")
    assert "more than one step group" in " ".join(invoke(*command).stderr.split())
    assert "auint4|8" in invoke(*command, "--step-groups", "per-step").stdout


def test_plan_names_the_widths_that_a_step_may_have(folders):
    root, _ = folders
    result = invoke("plan", root / "float", "--step-bits", "8,3", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    assert rows["mid_block.resnets.0.conv1"]["inputs"][0] == {
        "bits": 3, "wider": [8], "code": "affine", "signed": False, "symmetric": False
    }  # fmt: skip
    assert "wider" not in rows["conv_in"]["inputs"][0]
    for given, message in (
        ("4,x", "give whole numbers from 2 to 8"),
        ("4", "at least 2 items"),
        ("4,4", "ascend strictly"),
    ):
        assert message in " ".join(invoke("plan", root / "float", "--step-bits", given).stderr.split())
    both = invoke("plan", root / "float", "--step-bits", "4,8", "--activations", 8)
    assert both.exit_code == 2
    assert "activations has 8 bits" in " ".join(both.stderr.split())


def test_plan_file_replaces_the_rules(folders, tmp_path):
    root, _ = folders
    rules = [
        {"match": "conv_in", "reason": "kept for this test"},
        {"match": "*", "kinds": ["scores", "mix"], "left": {"code": "affine", "bits": 8}, "right": {"code": "affine", "bits": 8}},
        {"match": "*", "weight": {"bits": 2}, "input": {"bits": 8}},
    ]  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps({"rules": rules}))
    result = invoke("plan", root / "float", "--plan", tmp_path / "plan.json", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["layers"]}
    assert rows["conv_in"]["reason"] == "kept for this test"
    assert rows["conv_out"]["weight"]["bits"] == 2


def test_sample_writes_the_images_of_the_seeds(folders, tmp_path):
    from tests.conftest import build_pipeline

    root, _ = folders
    options = ["--num", 3, "--steps", 2, "--seed", 4, "--batch", 2]
    assert invoke("sample", root / "float", *options, "--output", tmp_path / "s").exit_code == 0
    expected = sample(build_pipeline(), image_seeds("sample", 4, 0, 2), 2)
    for index in range(2):
        assert np.array_equal(pixels(tmp_path / "s" / f"{index:05d}.png"), expected[index, 0].numpy())
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert invoke("sample", root / "w4a4", "--num", 4, "--steps", 2, "--output", tmp_path / "grid.png").exit_code == 0
    assert pixels(tmp_path / "grid.png").shape[0] >= 32


@pytest.mark.parametrize("device", ["nonsense", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(folders, tmp_path, device):
    result = invoke("sample", folders[0] / "float", "--num", 2, "--output", tmp_path / "x.png", "--device", device)
    assert result.exit_code != 0
    assert f"--device {device}: there is no such device" in " ".join(result.output.split())
    assert not (tmp_path / "x.png").exists()


def test_the_device_is_where_the_model_computes(folders, tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr("tcaq.cli.sample.placed", lambda pipe, device: moved.append(device) or pipe)
    asked = ["--num", 2, "--steps", 1, "--output", tmp_path / "x.png", "--device", "cuda:1"]
    assert invoke("sample", folders[0] / "w4a4", *asked).exit_code == 0
    assert moved == ["cuda:1"]


def test_sample_writes_each_batch_as_it_comes_and_names_what_was_there(folders, tmp_path, monkeypatch):
    root, _ = folders
    command = ["sample", root / "float", "--steps", 1, "--batch", 2, "--output", tmp_path / "s"]
    assert "earlier call" not in invoke(*command, "--num", 5).stderr
    assert "still holds 2 images of an earlier call, from 00003.png on" in " ".join(
        invoke(*command, "--num", 3).stderr.split()
    )

    def stop_at_second(pipe, seeds, steps, conditions, first):
        if first:
            raise KeyboardInterrupt
        return sample(pipe, seeds, steps, conditions, first)

    monkeypatch.setattr("tcaq.cli.sample.sample", stop_at_second)
    stopped = invoke(*command[:-1], tmp_path / "half", "--num", 5)
    assert stopped.exit_code == 130
    assert "goes on" not in stopped.stderr
    assert len(list((tmp_path / "half").iterdir())) == 2


def test_what_is_stopped_says_that_it_goes_on(monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tcaq.cli.quantize.open_float", stop)
    result = invoke("quantize", "reference", "--output", "o")
    assert result.exit_code == 130
    assert "the same command goes on from here" in " ".join(result.stderr.split())


def test_without_features_only_what_fits_the_images_is_measured(folders, tmp_path):
    root, _ = folders
    command = [
        "evaluate", root / "w4a4", "--reference", root / "float", "--num", 2, "--steps", 1, "--work", tmp_path / "work",
        "--json", tmp_path / "out.json",
    ]  # fmt: skip
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "need --features" in " ".join(result.stderr.split())
    assert "noise by step" in result.stderr
    scores = json.loads((tmp_path / "out.json").read_text())
    assert (scores["features"], scores["paired"]["fd_to_float"], scores["ratio"]["fd"]) == (None, None, None)
    assert next(line for line in result.stdout.splitlines() if "float" in line and "│" in line).count(" - ") == 3
    told = {"reference": "given torch.uint8 [1, 1, 16, 16]", "json:loads": "cannot be called without arguments"}
    told["tests.cli.test_verbs:Narrow"] = "fails on this model's images, [1, 16, 16]"
    for features, message in told.items():
        refused = invoke(*command[:-4], "--work", tmp_path / "none", "--features", features)
        assert isinstance(refused.exception, SystemExit), refused.output
        assert message in " ".join(refused.output.split())
    assert "say with --features" in " ".join(invoke(*command[:-4], "--real", tmp_path).output.split())
    assert not (tmp_path / "none").exists(), "nothing was sampled"


@pytest.mark.parametrize("verb", ["evaluate", "report"])
def test_a_reference_of_other_weights_is_refused(folders, tmp_path, verb):
    from tests.conftest import build_pipeline

    root, _ = folders
    build_pipeline(channels=(8, 8, 16)).save_pretrained(tmp_path / "other")
    for reference in (root / "w4a4", tmp_path / "other"):
        result = invoke(verb, root / "w4a4", "--reference", reference, "--num", 2, "--work", tmp_path / "work")
        assert result.exit_code == 2, result.output
        assert "are not those that" in " ".join(result.output.split())
    assert not (tmp_path / "work").exists(), "nothing was sampled"


@pytest.mark.parametrize("verb", ["quantize", "sample", "evaluate", "report", "compare"])
def test_more_steps_than_the_scheduler_has_are_refused(folders, tmp_path, verb):
    root, _ = folders
    args = {
        "quantize": [root / "float", "--output", tmp_path / "o"],
        "sample": [root / "w4a4", "--output", tmp_path / "o"],
        "evaluate": [root / "w4a4", "--reference", root / "float"],
        "report": [root / "w4a4", "--reference", root / "float"],
        "compare": [root / "float", "--output", tmp_path / "o"],
    }
    result = invoke(verb, *args[verb], "--steps", 1001)
    assert result.exit_code == 2, result.output
    assert "--steps 1001: DDIMScheduler of this model has 1000" in " ".join(result.output.split())
    assert not (tmp_path / "o").exists()


def test_report_shows_both_schedulers(folders, tmp_path):
    root, _ = folders
    options = ["--reference", root / "float", "--num", 2, "--steps", 3, "--features", "tests.cli.test_verbs:Pixels"]
    page, work = tmp_path / "page.html", tmp_path / "work"
    more = ["--schedulers", "DPMSolverMultistepScheduler,DDIMScheduler", "--output", page, "--work", work]
    result = invoke("report", root / "w4a4", *options, *more)
    assert result.exit_code == 0, result.output
    text = page.read_text()
    assert "DDIMScheduler, 3 steps" in text
    assert "DPMSolverMultistepScheduler, 3 steps" in text
    assert result.stdout.count("DDIMScheduler, 3 steps") == 1  # the model's own is there already
    assert len(list(work.iterdir())) == 4, "two models under two schedulers"
    assert invoke("report", root / "float", *options).exit_code == 2


@pytest.mark.parametrize(
    ("name", "why"), [("EulerDiscreteScheduler", "needs scaled inputs"), ("PNDMScheduler", "takes no generator")]
)
def test_what_unconditional_pipelines_cannot_drive_is_refused(folders, tmp_path, name, why):
    root, _ = folders
    result = invoke("sample", root / "w4a4", "--scheduler", name, "--output", tmp_path / "x.png")
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())


def test_integer_execution_says_what_runs_how_and_samples_nearly_the_same_images(folders, tmp_path):
    root, _ = folders
    images = {}
    for execution in ("fake", "integer"):
        output = tmp_path / f"{execution}.png"
        args = ("sample", root / "w4a4", "--num", 3, "--steps", 2, "--output", output, "--execution", execution)
        result = invoke(*args)
        assert result.exit_code == 0, result.output
        assert ("quantized layers run in integers" in " ".join(result.output.split())) is (execution == "integer")
        images[execution] = pixels(output).astype(float)
    assert np.median(abs(images["integer"] - images["fake"])) <= 1
    wrong = invoke("sample", root / "float", "--output", tmp_path / "x.png", "--execution", "integer")
    assert wrong.exit_code == 2
    assert "is not quantized" in " ".join(wrong.output.split())


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_an_exported_folder_samples_and_is_evaluated_like_a_checkpoint(folders, tmp_path, form, package):
    pytest.importorskip(package)
    root, _ = folders
    out = tmp_path / form
    result = invoke("export", root / "w4a4", "--format", form, "--output", out)
    assert result.exit_code == 0, result.output
    decibels = float(" ".join(result.output.split()).rpartition(":")[2].split()[0])
    assert decibels > 20
    assert invoke("sample", out, "--num", 2, "--steps", 2, "--output", tmp_path / "x.png").exit_code == 0
    refused = invoke("sample", out, "--num", 2, "--steps", 2, "--output", tmp_path / "y.png", "--device", "cuda")
    assert refused.exit_code != 0
    assert "exported models run on the CPU" in " ".join(refused.output.split())
    if form == "openvino":
        return  # loaded in the same way; it takes its time to compile
    result = invoke(
        "evaluate", out, "--reference", root / "float", "--num", 2, "--steps", 2, "--execution", "integer",
        "--features", "tests.cli.test_verbs:Pixels", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out.json").read_text())["paired"]["psnr"] > 10


def test_an_export_for_vnni_is_written_where_it_cannot_run(folders, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tcaq.cli.export.has_vnni", lambda: False)
    monkeypatch.setattr("tcaq.export.folder.has_vnni", lambda: False)
    result = invoke("export", folders[0] / "w4a4", "--format", "onnx", "--output", tmp_path / "out", "--vnni")
    assert result.exit_code == 0, result.output
    assert "not compared: this processor has no VNNI" in " ".join(result.output.split())
    assert (tmp_path / "out" / "unet" / "model.onnx").is_file()


def test_evaluate_writes_every_key_and_resumes(folders, tmp_path, monkeypatch):
    root, _ = folders
    np.savez(tmp_path / "real.npz", mean=np.zeros(4), covariance=np.eye(4))
    args = [
        "evaluate", root / "w4a4", "--reference", root / "float", "--num", 5, "--steps", 2, "--batch", 3,
        "--features", "tests.cli.test_verbs:Pixels", "--real", tmp_path / "real.npz", "--json", tmp_path / "out.json",
    ]  # fmt: skip
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "out.json").read_text())
    assert set(scores) == {
        "float",
        "quantized",
        "paired",
        "ratio",
        "num",
        "steps",
        "scheduler",
        "seed",
        "features",
        "versions",
    }
    assert set(scores["paired"]) == {"psnr", "ssim", "sqnr_per_step", "fd_to_float"}
    assert scores["ratio"]["fd"] == pytest.approx(scores["quantized"]["fd"] / scores["float"]["fd"])
    assert [row["timestep"] for row in scores["paired"]["sqnr_per_step"]] == [500, 0]
    assert (scores["num"], scores["seed"]) == (5, 1)
    monkeypatch.setattr("tcaq.evaluate.sampling.sample", lambda *_: pytest.fail("a finished batch was sampled again"))
    assert invoke(*args).exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == scores


def test_fewer_images_remove_none(folders, tmp_path, monkeypatch):
    root, _ = folders
    work, page = tmp_path / "work", tmp_path / "page.html"
    options = ["--reference", root / "float", "--steps", 2, "--batch", 3, "--work", work]
    evaluated = ["evaluate", root / "w4a4", *options, "--json", tmp_path / "out.json", "--num"]
    assert invoke(*evaluated, 8).exit_code == 0
    scores = json.loads((tmp_path / "out.json").read_text())
    images = {path: path.read_bytes() for path in work.rglob("*.safetensors")}
    assert invoke(*evaluated, 4).exit_code == 0
    assert invoke("report", root / "w4a4", *options, "--num", 3, "--output", page).exit_code == 0
    assert images.items() <= {path: path.read_bytes() for path in work.rglob("*.safetensors")}.items()
    monkeypatch.setattr("tcaq.evaluate.sampling.sample", lambda *_: pytest.fail("a finished batch was sampled again"))
    assert invoke(*evaluated, 8).exit_code == 0
    assert json.loads((tmp_path / "out.json").read_text()) == scores


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (
            ["quantize", "reference", "--output", "o", "--recipe", "tcak"],
            2,
            "unknown recipe 'tcak'; known: minmax, mse",
        ),
        (["quantize", "reference", "--output", "o", "--weights", "9"], 2, "weights"),
        (["quantize", "reference", "--output", "o", "--step-groups", "many"], 2, "--step-groups 'many'"),
        (["quantize", "reference", "--output", "o", "--weight-rounding", "up"], 2, "weight-rounding"),
        (
            ["quantize", "reference", "--output", "o", "--preset", "fast", "--rounds", "2"],
            2,
            "reconstructs nothing; leave --rounds out",
        ),
        (
            ["quantize", "reference", "--output", "o", "--preset", "fast", "--iterations", "9"],
            2,
            "leave --iterations out",
        ),
        (["quantize", "reference", "--output", "o", "--plan", "absent.json"], 2, "absent.json"),
        (["quantize", "no/such-model-anywhere", "--output", "o"], 1, "no/such-model-anywhere"),
        (["sample", "reference", "--output", "images.gif"], 2, "images.gif"),
        (["evaluate", "nowhere", "--reference", "reference"], 1, "nowhere"),
        (["no-such-verb"], 2, "no-such-verb"),
    ],
)
def test_wrong_use_says_so_and_exits(args, code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "o" / "model_index.json").exists()


def test_an_unfinished_quantization_is_not_taken_for_a_checkpoint(folders, tmp_path):
    (tmp_path / "half" / "run").mkdir(parents=True)
    result = invoke("sample", tmp_path / "half", "--output", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "not finished" in " ".join(result.output.split())
