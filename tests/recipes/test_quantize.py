"""The whole job on a tiny model: results, records, resuming, refusals."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDPMScheduler, EulerDiscreteScheduler

import tcaq
from tcaq.errors import NumericalError, PlanError, RunError, UsageError
from tcaq.models.sampler import predict, record, sample
from tcaq.models.seeds import image_seeds
from tcaq.recipes.presets import preset_recipe
from tcaq.recipes.quantize import quantize
from tcaq.records import Record
from tcaq.runs import Run
from tcaq.spec.grid import AffineGrid
from tcaq.spec.plan import Plan, Rule

SMALL = {
    "calibration": {"images": 4, "steps": 3, "batch": 2},
    "ranges": {"values": 500, "weight_candidates": 4, "input_candidates": 4},
    "reconstruction": {"iterations": 3, "inputs": 8, "batch": 4, "bias_rate": 0.1},
    "alignment": {"rounds": 1, "iterations": 2},
    "network": {"iterations": 2, "inputs": 8, "batch": 4},
}


def small(program="tcaq", **options):
    return preset_recipe(program, "full", **({**SMALL, **options} if program == "tcaq" else options))


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One undisturbed quantization."""
    from tests.conftest import build_pipeline

    folder = tmp_path_factory.mktemp("done") / "out"
    return quantize(build_pipeline(), small(), folder), folder


def test_with_no_memory_to_speak_of_every_record_is_the_same(done, tiny_pipeline, tmp_path):
    """Trajectories and activations on disk."""
    quantize(tiny_pipeline(), small(memory=1e-9), tmp_path / "out")
    runs = [Run.read(folder / "run") for folder in (done[1], tmp_path / "out")]
    assert runs[0].finished() == runs[1].finished()
    for name in runs[0].finished():
        for (_, one), (_, other) in zip(*(run.results(name) for run in runs), strict=True):
            assert Record(one.tensors).digest == Record(other.tensors).digest, name
    assert not list((tmp_path / "out" / "run").glob(".trajectories-*"))
    quantize(tiny_pipeline(), small(memory=1.0), tmp_path / "out")  # goes on with another budget: it changes nothing


def test_checkpoint_loads_through_diffusers_and_is_the_model_in_memory(done):
    pipe, folder = done
    loaded = DDIMPipeline.from_pretrained(folder)
    seeds = image_seeds("sample", 0, 0, 3)
    assert torch.equal(sample(loaded, seeds, 3), sample(pipe, seeds, 3))
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, torch.tensor([3, 900])).sample, pipe.unet(x, torch.tensor([3, 900])).sample)


def test_every_stage_leaves_its_record(done):
    run = Run.read(done[1] / "run")
    assert run.finished() == [
        "bypass", "collect/0", "collect/1", "collect/2", "collect/3", "collect/4", "collect/5", "correct", "equalize",
        "network", "observe", "reconstruct/0", "reconstruct/1", "scale/inputs", "scale/weights", "select", "temper",
    ]  # fmt: skip
    losses = [record.meta for _, record in run.results("reconstruct/0")]
    assert len(losses) == 23
    assert all(0 <= m["loss_after"] < 10 for m in losses)
    choices = next(record for _, record in run.results("select")).meta["choices"]
    assert set(choices["mid_block.attentions.0.mix"][0]) >= {"ratio", "use_log2", "error_even", "error_log2"}


@pytest.mark.parametrize("steps", [2, 7])
def test_runs_with_other_numbers_of_steps(done, steps):
    images = sample(done[0], image_seeds("sample", 0, 0, 2), steps)
    assert images.shape == (2, 1, 16, 16)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerDiscreteScheduler])
def test_runs_under_another_scheduler(done, scheduler):
    pipe = DDIMPipeline.from_pretrained(done[1])
    other = scheduler.from_config(pipe.scheduler.config)
    other.set_timesteps(4)
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * other.init_noise_sigma
    with torch.no_grad():
        for t in other.timesteps:  # fractional timesteps for Euler
            x = other.step(pipe.unet(other.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert torch.isfinite(x).all()


def test_minmax_collapses_no_stage_into_another(tiny_pipeline, tmp_path):
    recipe = small("minmax", calibration={"images": 2, "steps": 2})
    quantize(tiny_pipeline(), recipe, tmp_path / "out")
    assert Run.read(tmp_path / "out" / "run").finished() == [
        "collect/0", "observe", "scale/inputs", "scale/weights", "select",
    ]  # fmt: skip


def test_eight_bits_are_closer_than_four(tiny_pipeline):
    original = tiny_pipeline()
    _, trajectories = record(original, image_seeds("evaluation", 0, 0, 4), 3)
    expected = predict(original.unet, trajectories)
    errors = []
    for bits in (4, 8):
        options = {"weights": bits, "activations": bits, "calibration": {"images": 4, "steps": 3}}
        pipe = quantize(tiny_pipeline(), preset_recipe("tcaq", "fast", **options))
        errors.append(float((predict(pipe.unet, trajectories) - expected).square().mean()))
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"bypass": None}, "bypass"),
        ({"tcr": None}, "equalize"),
        ({"alignment": None}, "reconstruct/1"),
        ({"network": None}, "network"),
        ({"correction": None}, "correct"),
        ({"reconstruction": None}, "reconstruct/0"),
    ],
)
def test_each_part_can_be_left_out(tiny_pipeline, tmp_path, change, absent):
    quantize(tiny_pipeline(), small(**change), tmp_path / "out")
    finished = Run.read(tmp_path / "out" / "run").finished()
    assert absent not in finished
    assert "scale/inputs" in finished


def test_without_daq_every_probability_grid_is_even(tiny_pipeline):
    pipe = quantize(tiny_pipeline(), small(daq=None, reconstruction=None))
    quantizer = pipe.unet.mid_block.attentions[0].mix.left_quantizer
    assert str(quantizer.grid) == "unit4"
    assert not quantizer.use_log2.any()


def test_alignment_goes_back_when_the_distance_no_longer_falls(tiny_pipeline, tmp_path):
    answers = iter([5.0, 7.0])
    quantize(tiny_pipeline(), small(), tmp_path / "judged", judge=lambda a, b: next(answers))
    kept = quantize(tiny_pipeline(), small(alignment=None), tmp_path / "round0")
    back = tcaq.load(tmp_path / "judged")
    for (name, a), b in zip(kept.unet.state_dict().items(), back.unet.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    scores = [r.meta["fd"] for n in (0, 1) for _, r in Run.read(tmp_path / "judged" / "run").results(f"score/{n}")]
    assert scores == [5.0, 7.0]


def test_stopped_at_any_stage_it_goes_on_to_the_same_bytes(done, tiny_pipeline, tmp_path):
    class StopError(Exception):
        pass

    stops = [("collect/0", 1), ("scale/weights", 0), ("reconstruct/0", 9), ("collect/1", 1), ("reconstruct/1", 22)]
    for stage, at in stops:

        def stop(name, done_, total, resumed, stage=stage, at=at):
            if (name, done_, resumed) == (stage, at, False):
                raise StopError

        with pytest.raises(StopError):
            quantize(tiny_pipeline(), small(), tmp_path / "out", on_progress=stop)
    quantize(tiny_pipeline(), small(), tmp_path / "out")
    assert files(tmp_path / "out") == files(done[1])


KILLED = """
import sys, torch
torch.set_num_threads(1)
from tests.conftest import build_pipeline
from tests.recipes.test_quantize import small
from tcaq.recipes.quantize import quantize
quantize(build_pipeline(), small(), sys.argv[1], on_progress=lambda *a: print(*a, flush=True))
"""


@pytest.mark.timeout(600)
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path):
    folders = tmp_path / "undisturbed", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED]
    began = time.monotonic()
    subprocess.run([*command, str(folders[0])], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - began
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        with subprocess.Popen([*command, str(folders[1])], stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # imports are over, work has begun
            time.sleep(float(torch.rand(1, generator=draw)) * whole * 0.3)
            process.send_signal(signal.SIGKILL)
    subprocess.run([*command, str(folders[1])], check=True, stdout=subprocess.DEVNULL)
    assert files(folders[0]) == files(folders[1])


def test_another_recipe_never_reuses_the_run(done, tiny_pipeline):
    before = files(done[1])
    with pytest.raises(RunError, match=r"recipe\.weights"):
        quantize(tiny_pipeline(), small(weights=6), done[1])
    assert files(done[1]) == before


def test_other_weights_never_reuse_the_run(done, tiny_pipeline):
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(1e-3)
    with pytest.raises(RunError, match="weights"):
        quantize(pipe, small(), done[1])


def test_refusals_before_anything_is_written(tiny_pipeline, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown recipe 'tcak'"):
        preset_recipe("tcak", "full")
    with pytest.raises(UsageError, match="unknown preset 'best'"):
        preset_recipe("tcaq", "best")
    with pytest.raises(UsageError, match=r"weights.*given: 9.*activations.*given: 1"):
        preset_recipe("tcaq", "full", weights=9, activations=1)
    grid = AffineGrid(bits=4)
    with pytest.raises(PlanError, match="no rule matches layer"):
        quantize(tiny_pipeline(), small(), out, plan=Plan(rules=(Rule(match="conv_in", weight=grid, input=grid),)))
    pipe = tiny_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(NumericalError, match=r"'conv_out.weight' holds NaN or infinity"):
        quantize(pipe, small(), out)
    assert not out.exists()


def test_an_output_folder_with_other_things_is_refused(tiny_pipeline, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunError, match=r"not a run of tcaq.*thesis.txt"):
        quantize(tiny_pipeline(), small(), tmp_path)


def test_the_correction_stays_as_far_as_it_helps(done):
    run = Run.read(done[1] / "run")
    tried = next(record for _, record in run.results("temper")).meta
    correction = next(record for _, record in run.results("correct")).tensors

    def images(stage):
        return torch.cat([record.tensors["images"] for _, record in run.results(stage)]).double()

    differences = [images(f"collect/{n}") - images("collect/0") for n in (3, 4, 5)]
    errors = [statistics.geometric_mean([float(one.square().mean()) for one in each]) for each in differences]
    assert tried["strengths"] == [0.0, 0.5, 1.0]
    assert tried["errors"] == pytest.approx(errors)
    assert tried["kept"] == tried["strengths"][errors.index(min(errors))]
    kept = done[0].unet.noise_correction
    torch.testing.assert_close(kept.slope, (1 + correction["slope"]) ** tried["kept"] - 1)
    torch.testing.assert_close(kept.bias, correction["bias"] * tried["kept"])


def test_a_folder_with_anything_but_a_run_is_left_alone(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    before = files(tmp_path / "model")
    with pytest.raises(
        UsageError, match=r"model holds model_index.json, scheduler, unet, which a checkpoint would replace"
    ):
        quantize(tiny_pipeline(), small(), tmp_path / "model")
    assert files(tmp_path / "model") == before


def test_a_pipeline_whose_quantization_was_interrupted_is_to_be_loaded_anew(tiny_pipeline, tmp_path):
    def interrupt(stage: str, *_: object) -> None:
        if stage == "scale/inputs":
            raise KeyboardInterrupt

    pipe, recipe = tiny_pipeline(), small("minmax", calibration={"images": 2, "steps": 2})
    with pytest.raises(KeyboardInterrupt):
        quantize(pipe, recipe, tmp_path / "out", on_progress=interrupt)
    with pytest.raises(PlanError, match=r"load the original model anew; the run in .* goes on"):
        quantize(pipe, recipe, tmp_path / "out")
    assert Run.read(tmp_path / "out" / "run").finished()
    quantize(tiny_pipeline(), recipe, tmp_path / "out")


def test_a_run_is_of_one_judge(tiny_pipeline, tmp_path):
    def one(a, b):
        return 1.0

    def another(a, b):
        return 2.0

    quantize(tiny_pipeline(), small(), tmp_path / "out", judge=one)
    with pytest.raises(RunError, match="judge"):
        quantize(tiny_pipeline(), small(), tmp_path / "out", judge=another)


def test_calibration_goes_by_its_batch_throughout(tiny_pipeline):
    pipe, sizes = tiny_pipeline(), set()
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.add(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    fits = {"reconstruction": None, "alignment": None, "network": None}
    quantize(pipe, small(calibration={"images": 6, "steps": 3, "batch": 2}, **fits))
    assert max(sizes) == 2


def test_a_model_in_training_is_calibrated_as_it_samples(tiny_pipeline):
    pipe, training = tiny_pipeline(), []
    pipe.unet.train().register_forward_pre_hook(lambda module, _: training.append(module.training))
    quantize(pipe, small("minmax", calibration={"images": 2, "steps": 2}))
    assert training
    assert not any(training)
