"""The benchmark on conditional pipelines: all contenders get the call that the pipeline makes, and sample what was asked for."""

from __future__ import annotations

import pytest
import torch

from tcaq import checkpoint
from tcaq.bench.bout import Bout
from tcaq.bench.calls import call_of
from tcaq.bench.measure import Settings, benchmark
from tcaq.errors import UsageError
from tcaq.models.load import load_pipeline

from .quantized import quantized_of
from .tiny import conditions_of, pipeline_of

# the float FLUX of diffusers cannot be traced for other sizes than the example's: its rotary embedding slices a shape
TRIED = {"sd": ["onnx", "onnx-fp32"], "dit": ["openvino", "openvino-fp32"], "flux-guided": ["onnx"]}


@pytest.mark.parametrize("name", TRIED)
def test_every_contender_runs(name, tmp_path):
    runtime = TRIED[name][0]
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    pipeline_of(name).save_pretrained(tmp_path / "float")
    checkpoint.save(quantized_of(name, bits=8)[0], tmp_path / "w8a8")
    bout = Bout(
        tmp_path / "w8a8", str(tmp_path / "float"), tmp_path / "work", lambda: load_pipeline(str(tmp_path / "float"))
    )
    names = ["bf16", "fake", "integer", "integer-bf16", *TRIED[name]]
    settings = Settings(batches=(2,), repeat=1, steps=2, images=2)
    result = benchmark(bout, names, settings, lambda _: None)
    assert result.calls_a_step == (2 if name == "flux-guided" else 1)
    rows = {row.name: row for row in result.rows}
    assert {name: row.problem for name, row in rows.items() if row.problem is not None} == {}
    assert all(row.psnr > 50 for name, row in rows.items() if name.endswith("-fp32"))
    assert all(row.psnr > 12 for row in list(rows.values())[1:])  # small random models; unrelated images have less
    assert abs(rows["fake"].psnr - rows["integer"].psnr) < 3


def test_a_call_is_the_pipelines_own_for_as_many_images_and_of_the_size_asked_for():
    pipe = pipeline_of("sd")
    asked = conditions_of("sd")
    given = call_of(pipe, 3, None, asked)
    assert given["sample"].shape == (6, 4, 8, 8)  # both halves of guidance
    assert given["encoder_hidden_states"].shape[0] == 6
    assert not torch.equal(given["encoder_hidden_states"][3], given["encoder_hidden_states"][4])  # another prompt
    assert call_of(pipe, 1, 24, asked)["sample"].shape == (2, 4, 12, 12)
    with pytest.raises(UsageError, match="DiTPipeline takes no height"):
        call_of(pipeline_of("dit"), 1, 24, conditions_of("dit"))
