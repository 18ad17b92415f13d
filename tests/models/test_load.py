"""What a user named and cannot be read is one error that says why, and what can is read as it was saved."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from tcaq.errors import ModelError
from tcaq.models.load import load_pipeline, stored_dtype
from tcaq.models.quantizer import register

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "unet" / WEIGHTS).write_bytes((f / "unet" / WEIGHTS).read_bytes()[:5000]),
        lambda f: (f / "unet" / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        lambda f: edit(f / "model_index.json", _class_name="PipelineOfTomorrow"),
        lambda f: edit(f / "unet" / "config.json", block_out_channels="8"),
    ],
    ids=["truncated", "pointer", "newer", "type"],
)
def test_what_cannot_be_read_is_named(folder, damage):
    damage(folder)
    with pytest.raises(ModelError, match=r"cannot load .* tried as a local directory"):
        load_pipeline(str(folder))


def test_files_that_lack_layers_are_named(folder):
    tensors = load_file(folder / "unet" / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"files of unet lack conv_in\.weight"):
        load_pipeline(str(folder))


def test_files_of_a_variant_alone_are_hinted_at(tiny_pipeline, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ModelError, match="variant 'fp16'"):
        load_pipeline(str(tmp_path))


def test_a_checkpoint_without_its_run_keeps_its_dtype(tiny_pipeline, quantized_tiny, tmp_path):
    register()
    quantized_tiny(tiny_pipeline()).save_pretrained(tmp_path / "full")
    unet = UNet2DModel.from_pretrained(tmp_path / "full" / "unet", torch_dtype=torch.float16)
    pipe = tiny_pipeline()
    pipe.register_modules(unet=unet)
    pipe.save_pretrained(tmp_path / "half")
    assert stored_dtype(tmp_path / "full") == torch.float32
    assert stored_dtype(tmp_path / "half") == torch.float16
