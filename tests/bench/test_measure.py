"""The benchmark on a tiny model: what it reports, and what it does with contenders that cannot run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tcaq import checkpoint
from tcaq.bench import contenders, measure, memory, peers
from tcaq.bench.bout import Bout
from tcaq.bench.contenders import CONTENDERS, Contender
from tcaq.bench.measure import Settings, benchmark
from tcaq.bench.memory import peak_memory
from tcaq.bench.peers import FloatTraceable, any_batch
from tcaq.cli import app
from tcaq.cli.bench import bench_table
from tcaq.errors import MissingExtraError, UsageError
from tcaq.export.example import example_of, first_call
from tcaq.models.load import load_pipeline

SETTINGS = Settings(batches=(1, 2), repeat=1, steps=2, images=2)


@pytest.fixture(scope="module")
def bout(tiny_pipeline, quantized_tiny, tmp_path_factory) -> Bout:
    root = tmp_path_factory.mktemp("bench")
    tiny_pipeline().save_pretrained(root / "float")
    checkpoint.save(quantized_tiny(tiny_pipeline(), weights=8), root / "quantized")
    return Bout(root / "quantized", str(root / "float"), root / "work", lambda: load_pipeline(str(root / "float")))


def test_a_row_for_each_contender_with_float_first(bout):
    told = []
    result = benchmark(bout, ["fake", "integer"], SETTINGS, told.append)
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["fp32", "fake", "integer"]
    assert told == [f"building {name}" for name in rows]
    for row in rows.values():
        assert set(row.seconds) == {1, 2}
        assert all(seconds > 0 for seconds in row.seconds.values())
        assert row.problem is None
    assert rows["fp32"].psnr is None
    assert abs(rows["fake"].psnr - rows["integer"].psnr) < 3
    assert rows["integer"].size == (bout.folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert measure.Benchmark.model_validate_json(result.model_dump_json()) == result


def test_the_float_model_against_itself_has_the_ceiling_for_psnr(bout, monkeypatch):
    monkeypatch.setitem(CONTENDERS, "again", CONTENDERS["fp32"])
    assert benchmark(bout, ["again"], SETTINGS, lambda _: None).rows[1].psnr == 100


def test_float_baselines_run_in_the_layout_of_integer_kernels_too(bout):
    names = ["fp32-channels-last", "bf16", "bf16-channels-last"]
    rows = {row.name: row for row in benchmark(bout, names, SETTINGS, lambda _: None).rows}
    assert [rows[name].problem for name in names] == [None] * 3
    assert rows["fp32-channels-last"].psnr > 60
    pipe = CONTENDERS["fp32-channels-last"](bout).pipe
    assert pipe.unet.down_blocks[1].resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_contender_that_cannot_run_says_why_and_the_others_go_on(bout, monkeypatch):
    def lacking(_: Bout) -> Contender:
        raise MissingExtraError("nncf", "bench")

    def broken(_: Bout) -> Contender:
        raise RuntimeError("no such operator\nand a page of stack")

    def narrow(bout: Bout) -> Contender:
        def refuse(_, args, given):
            if len(args[0] if args else given["sample"]) > 1:
                raise RuntimeError("one image only")

        pipe = bout.load_float()
        pipe.unet.register_forward_pre_hook(refuse, with_kwargs=True)
        return Contender(pipe, None)

    monkeypatch.setitem(CONTENDERS, "nncf", lacking)
    monkeypatch.setitem(CONTENDERS, "torchao", broken)
    monkeypatch.setitem(CONTENDERS, "quanto", narrow)
    names = ["nncf", "torchao", "quanto", "fake"]
    rows = {row.name: row for row in benchmark(bout, names, SETTINGS, lambda _: None).rows}
    assert rows["quanto"].problem == "RuntimeError: one image only"
    assert "pip install 'tcaq[bench]'" in rows["nncf"].problem
    assert rows["torchao"].problem == "RuntimeError: no such operator"
    assert rows["fake"].problem is None


def test_integer_without_a_kernel_is_left_out_not_timed_as_fake(bout, monkeypatch):
    monkeypatch.setattr(contenders, "lower", lambda *_, **__: measure_lowering("no kernels here"))
    assert benchmark(bout, ["integer"], SETTINGS, lambda _: None).rows[1].problem == "no kernels here"


def measure_lowering(reason: str):
    from tcaq.integer.lower import LayerExecution, Lowering

    return Lowering((LayerExecution("conv_in", "fake", reason),))


def test_the_float_model_in_another_runtime_is_the_float_model(bout):
    pytest.importorskip("onnxruntime")
    row = benchmark(bout, ["onnx-fp32"], SETTINGS, lambda _: None).rows[1]
    assert row.problem is None
    assert row.psnr > 60
    assert row.size == (bout.work / "onnx-fp32.onnx").stat().st_size


@torch.no_grad()
def test_a_peers_graph_is_for_any_number_of_images(tiny_pipeline):
    pipe = tiny_pipeline(channels=(8, 16))
    interface = example_of(pipe.unet, first_call(pipe)).interface
    traced = FloatTraceable(pipe.unet, interface).eval()
    x, time = torch.randn(8, 1, 16, 16), torch.tensor([500.0])
    graph = any_batch(traced, interface, (x, time))
    for count in (4, 1, 8):
        assert torch.equal(graph(x[:count], time), traced(x[:count], time))


def test_compiled_float_has_a_graph_for_each_number_of_images(tiny_pipeline, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    peers.compiled(tiny_pipeline())
    assert asked == [{"dynamic": False}]


def test_what_was_built_of_something_else_is_not_taken_for_this_models(bout, tiny_pipeline, quantized_tiny, tmp_path):
    work = tmp_path / "work"
    benchmark(replace(bout, work=work), ["fake"], SETTINGS, lambda _: None)
    benchmark(replace(bout, work=work), ["fake"], SETTINGS, lambda _: None)
    checkpoint.save(quantized_tiny(tiny_pipeline(), weights=4), tmp_path / "other")
    with pytest.raises(UsageError, match="another model"):
        benchmark(replace(bout, work=work, folder=tmp_path / "other"), ["fake"], SETTINGS, lambda _: None)


def test_unknown_names_are_refused(bout):
    with pytest.raises(UsageError, match=r"unknown contenders: tensorrt; known: fp32, fp32-channels-last"):
        benchmark(bout, ["tensorrt"], SETTINGS, lambda _: None)


def test_peak_memory_is_taken_in_another_process(bout, monkeypatch):
    assert 2**18 < peak_memory(bout, "integer", batch=1, steps=1) < 2**30
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    assert peak_memory(bout, "integer", batch=1, steps=1) == "memory not measured, its process ended with code 1"


@pytest.mark.parametrize(
    ("command", "said"),
    [("echo no room >&2; exit 3", "ended with code 3: no room"), ("kill -9 $$", "was killed by signal 9")],
)
def test_a_process_that_fails_says_why_and_its_row_stays(bout, monkeypatch, tmp_path, command, said):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(program))
    result = benchmark(bout, ["fake"], SETTINGS.model_copy(update={"memory": True}), lambda _: None)
    assert [row.problem for row in result.rows] == [f"memory not measured, its process {said}"] * 2
    assert bench_table(result).row_count == 2


def test_a_runtime_is_imported_before_memory_counts(monkeypatch):
    imported = []
    monkeypatch.setattr(memory, "import_module", imported.append)
    for name in CONTENDERS:
        memory._import_runtime(name)
    assert set(imported) == {"onnxruntime", "openvino", "torchao", "optimum.quanto"}


def test_the_command_writes_json_and_a_table(bout, tmp_path):
    arguments = [
        "bench",
        bout.folder,
        "--reference",
        bout.model,
        "--against",
        "integer",
        "--batches",
        "2",
        "--repeat",
        "1",
    ]
    arguments += ["--steps", "2", "--images", "2", "--json", tmp_path / "bench.json"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["fp32", "integer"]
    assert "fp32" in result.stdout
    assert " dB" in result.stdout
    assert CliRunner().invoke(app, [str(a) for a in (*arguments, "--batches", "2,x")]).exit_code == 2
