"""Checkpoints among the other things people do with diffusers: cards, the Hub, adapters, compiling, loading by a config."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.quantizers import PipelineQuantizationConfig
from huggingface_hub import metadata_load
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from typer.testing import CliRunner

import tcaq
from tcaq.checkpoint import describe
from tcaq.cli import app
from tcaq.errors import ModelError, UsageError
from tcaq.layers.processors import is_attention
from tcaq.models.card import card, metadata_of
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import load_pipeline
from tcaq.models.prompting import resolve_conditions
from tcaq.models.publish import LEFT_OUT
from tcaq.models.sampler import record
from tcaq.models.trajectories import predict
from tcaq.recipes.presets import preset_recipe

from .quantized import quantized_of
from .tiny import conditions_of, pipeline_of

ORIGINAL_CARD = "---\nlicense: openrail++\nbase_model: someone/original\n---\n\n# Original\n"


def fast(name, **options):
    asked = conditions_of(name).model_dump(mode="json")
    calibration = {"images": 2, "steps": 2, "batch": 2, "conditions": asked}
    ranges = {"values": 200, "weight_candidates": 2, "input_candidates": 2}
    return preset_recipe("mse", "fast", calibration=calibration, ranges=ranges, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float pipeline with a card and a licence, and its quantization."""
    root = tmp_path_factory.mktemp("ecosystem")
    pipeline_of("sd").save_pretrained(root / "float")
    (root / "float" / "README.md").write_text(ORIGINAL_CARD)
    (root / "float" / "LICENSE.md").write_text("the terms")
    tcaq.quantize(load_pipeline(str(root / "float")), fast("sd"), root / "w4a4")
    return root


def some_calls(pipe):
    return record(pipe, (1, 2), 2, resolve_conditions(pipe, conditions_of("sd")))[1]


def test_the_card_tells_what_it_is_and_carries_the_licence(folders):
    data = metadata_load(folders / "w4a4" / "README.md")
    assert data["license"] == "openrail++"
    assert data["base_model"] == "someone/original"
    assert (data["base_model_relation"], data["pipeline_tag"]) == ("quantized", "text-to-image")
    text = (folders / "w4a4" / "README.md").read_text()
    assert "weights 4 bits, activations 4 bits" in text
    assert "from diffusers import StableDiffusionPipeline" in text
    assert "3 prompts, such as: a cat" in text
    counted = sum(int(line.split("|")[1]) for line in text.splitlines() if line.startswith("| ") and line[2].isdigit())
    assert counted == len(describe(folders / "w4a4")[1].plan.layers)
    assert str(folders) not in text
    assert (folders / "w4a4" / "LICENSE.md").read_text() == "the terms"


def test_without_a_card_the_licence_is_left_open(tmp_path):
    tcaq.quantize(pipeline_of("dit"), fast("dit"), tmp_path)
    data = metadata_load(tmp_path / "README.md")
    assert not {"license", "base_model"} & set(data)
    assert "look it up before you share" in (tmp_path / "README.md").read_text()


def test_push_uploads_the_checkpoint_and_leaves_the_run(folders, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "tcaq.models.publish.HfApi.create_repo", lambda _, name, **options: calls.append((name, options))
    )
    monkeypatch.setattr(
        "tcaq.models.publish.HfApi.upload_folder",
        lambda _, **options: calls.append(options) or "https://hub/owner/name",
    )
    result = CliRunner().invoke(app, ["push", str(folders / "w4a4"), "owner/name", "--private"])
    assert result.exit_code == 0, result.output
    assert calls[0] == ("owner/name", {"private": True, "exist_ok": True})
    assert Path(calls[1]["folder_path"]) == folders / "w4a4"
    assert calls[1]["ignore_patterns"] == LEFT_OUT
    broken = CliRunner().invoke(app, ["push", str(folders / "float"), "owner/name"])
    assert broken.exit_code == 1
    assert "was not quantized by tcaq" in " ".join(broken.output.split())


def test_without_a_network_push_says_so(folders):
    command = [sys.executable, "-m", "tcaq", "push", str(folders / "w4a4"), "owner/name"]
    nowhere = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_none"}
    done = subprocess.run(command, env=nowhere, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "cannot upload to 'owner/name' at http://127.0.0.1:9" in said
    assert "Traceback" not in said


def test_a_broken_card_of_the_original_stops_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\nbase_model: {\n---\n")
    assert metadata_of(str(tmp_path)) == {}


def test_a_folder_that_moved_is_no_repository(folders, tmp_path):
    pipe = tcaq.load(folders / "w4a4")
    config = pipe.unet.config.quantization_config
    assert "base_model:" not in card(pipe, config, str(tmp_path / "moved"), {})
    assert "base_model: owner/name\n" in card(pipe, config, "owner/name", {})


def test_a_hub_that_refuses_is_named(folders, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("tcaq.models.publish.HfApi.create_repo", refuse)
    result = CliRunner().invoke(app, ["push", str(folders / "w4a4"), "owner/name"])
    assert result.exit_code == 1
    assert "cannot upload to 'owner/name'" in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["sdxl", "sd35", "flux"])
def test_adapters_load_on_other_families(name, tmp_path):
    torch.manual_seed(0)
    donor = pipeline_of(name)
    component, plain = find_denoiser(donor)
    plain.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    type(donor).save_lora_weights(tmp_path, **{f"{component}_lora_layers": get_peft_model_state_dict(plain)})
    pipe, calls = quantized_of(name)
    denoiser = find_denoiser(pipe)[1]
    before = predict(denoiser, calls)
    if name == "flux":  # its pipeline reads a float weight of every layer: docs/checkpoint.md
        denoiser.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    else:
        pipe.load_lora_weights(tmp_path)
    assert not torch.allclose(predict(denoiser, calls), before, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(predict(denoiser, calls), before)


def test_adapters_load_and_run_and_are_not_fused(folders, tmp_path):
    torch.manual_seed(0)
    donor = pipeline_of("sd")
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet))
    calls = some_calls(pipeline_of("sd"))
    pipe = tcaq.load(folders / "w4a4")
    before = predict(pipe.unet, calls)
    pipe.load_lora_weights(tmp_path)
    adapted = predict(pipe.unet, calls)
    assert not torch.allclose(adapted, before, atol=1e-3)
    for quantized in (pipe.unet, copy.deepcopy(pipe.unet)):
        with pytest.raises(UsageError, match="cannot be fused into a quantized denoiser"):
            quantized.fuse_lora()
    with pytest.raises(UsageError, match="cannot be fused"):
        pipe.fuse_lora()
    with pytest.raises(UsageError, match="unload_lora_weights"):
        tcaq.checkpoint.save(pipe, tmp_path / "adapted")
    with pytest.raises(UsageError, match="unload_lora_weights"):
        pipe.save_pretrained(tmp_path / "adapted")
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe.unet, calls), before)


def test_a_model_with_an_adapter_is_not_quantized_until_it_is_fused(tmp_path):
    donor, pipe = pipeline_of("sd"), pipeline_of("sd")
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet))
    pipe.load_lora_weights(tmp_path)
    with pytest.raises(ModelError, match=r"fuse_lora\(\).*unload_lora_weights"):
        tcaq.quantize(pipe, fast("sd"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    tcaq.quantize(pipe, fast("sd"), tmp_path / "fused")
    calls = some_calls(pipeline_of("sd"))
    assert torch.equal(predict(tcaq.load(tmp_path / "fused").unet, calls), predict(pipe.unet, calls))


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.enable_attention_slicing(),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
    ],
    ids=["slicing", "processor", "fused"],
)
def test_attention_stays_as_it_was_calibrated(change):
    pipe, calls = quantized_of("sd")
    expected = predict(pipe.unet, calls)
    with pytest.raises(UsageError, match="keeps its processor"):
        change(pipe)
    assert torch.equal(predict(pipe.unet, calls), expected)
    pipe.unet.dequantize()
    change(pipe)
    assert {type(m.processor).__module__.split(".")[0] for m in pipe.unet.modules() if is_attention(m)} == {"diffusers"}


def test_a_pipeline_config_applies_to_what_is_quantized_already(folders):
    config = describe(folders / "w4a4")[1]
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    with pytest.warns(
        UserWarning, match="from the model will be used"
    ):  # diffusers says that the file's own config counts
        loaded = DiffusionPipeline.from_pretrained(folders / "w4a4", quantization_config=mapping)
    calls = some_calls(pipeline_of("sd"))
    assert torch.equal(predict(loaded.unet, calls), predict(tcaq.load(folders / "w4a4").unet, calls))
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        DiffusionPipeline.from_pretrained(folders / "float", quantization_config=mapping)


def test_names_of_classes_stay_with_the_checkpoint(tmp_path):
    pipe = pipeline_of("dit")
    pipe.labels = {"bag": 8, "coat": 4, "jacket": 4}
    tcaq.quantize(pipe, fast("dit"), tmp_path)
    again = tcaq.load(tmp_path)
    assert again.labels == {"bag": 8, "coat": 4, "jacket": 4}
    assert resolve_conditions(again).labels == (4, 8)


def test_saved_as_a_whole_the_text_encoder_stays_float(folders, tmp_path):
    pipe = tcaq.load(folders / "w4a4")
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.text_encoder).__name__ == "CLIPTextModel"
    assert not hasattr(again.text_encoder, "hf_quantizer")
    calls = some_calls(pipe)
    assert torch.equal(predict(again.unet, calls), predict(pipe.unet, calls))


@pytest.mark.parametrize("name", ["flux"])
def test_compiles_whole(name):
    torch._dynamo.reset()
    pipe = tcaq.quantize(pipeline_of(name), fast(name, linear_inputs="token", weights=8, activations=8))
    calls = record(pipe, (1, 2), 2, resolve_conditions(pipe, conditions_of(name)))[1]
    denoiser = find_denoiser(pipe)[1]
    expected = predict(denoiser, calls)
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    actual = predict(compiled, calls)
    torch._dynamo.reset()
    assert float((actual - expected).norm() / expected.norm()) < 0.02  # a last digit may move a value to the next code
