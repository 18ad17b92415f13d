from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from tcaq import checkpoint
from tcaq.errors import CheckpointError
from tcaq.layers.insert import insert
from tcaq.layers.modes import floating
from tcaq.models import integrity
from tcaq.models.config import TcaqConfig
from tcaq.models.denoiser import attach_clock
from tcaq.models.units import default_plan, resolve
from tcaq.spec.steps import StepGroups

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    return unet(x, torch.tensor(500)).sample


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Callable[..., Any], quantized_tiny: Callable[..., Any]) -> DDIMPipeline:
    return quantized_tiny(tiny_pipeline())


@pytest.fixture(scope="module")
def other(tiny_pipeline: Callable[..., Any], quantized_tiny: Callable[..., Any]) -> DDIMPipeline:
    return quantized_tiny(tiny_pipeline(), weights=3)


@pytest.fixture
def folder(pipe: DDIMPipeline, tmp_path: Path) -> Path:
    checkpoint.save(pipe, tmp_path / "out")
    return tmp_path / "out"


def test_packing_changes_no_output(
    tiny_pipeline: Callable[..., Any], quantized_tiny: Callable[..., Any], pipe: DDIMPipeline
) -> None:
    again = quantized_tiny(tiny_pipeline())
    assert torch.equal(output(again.unet), output(pipe.unet))
    with floating(pipe.unet), pytest.raises(CheckpointError, match="only packed integer codes"):
        output(pipe.unet)


def test_load_gives_what_was_saved(pipe: DDIMPipeline, folder: Path) -> None:
    before = output(pipe.unet)
    loaded = checkpoint.load(folder)
    assert isinstance(loaded, DDIMPipeline)
    assert torch.equal(output(loaded.unet), before)
    assert not loaded.unet.training
    assert checkpoint.load(folder, torch.bfloat16).unet.dtype == torch.bfloat16


def test_describe_needs_no_tensors(pipe: DDIMPipeline, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert checkpoint.describe(folder) == ("unet", pipe.unet.config.quantization_config)


def test_save_replaces_a_checkpoint_and_leaves_other_files(other: DDIMPipeline, folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "record.json").write_text("{}")
    (folder / ".saving-killed").mkdir()
    (folder / ".saving-killed" / "half").write_bytes(b"x")
    checkpoint.save(other, folder, max_shard_size="40KB")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model_index.json", "run", "scheduler", "unet"]
    assert not (folder / WEIGHTS).exists()
    assert torch.equal(output(checkpoint.load(folder).unet), output(other.unet))


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_interrupted_save_never_looks_whole(
    pipe: DDIMPipeline, other: DDIMPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    replace, left = os.replace, iter(range(moves))

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).parent == folder and next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    if moves < 3:
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(other, folder)
        with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
            checkpoint.load(folder)
    monkeypatch.undo()
    checkpoint.save(other, folder)
    assert torch.equal(output(checkpoint.load(folder).unet), output(other.unet))


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 60 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_checkpoint(
    pipe: DDIMPipeline, other: DDIMPipeline, folder: Path, full_disk: None
) -> None:
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        checkpoint.save(other, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model_index.json", "scheduler", "unet"]
    assert torch.equal(output(checkpoint.load(folder).unet), output(pipe.unet))


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_truncated_files_are_named(folder: Path, kept: float) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors is missing, truncated or damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize("part", ["unet/config.json", "model_index.json", str(WEIGHTS)])
def test_missing_files_are_named(folder: Path, part: str) -> None:
    (folder / part).unlink()
    with pytest.raises(CheckpointError, match=Path(part).name.replace(".", r"\.") + ".* is missing"):
        checkpoint.load(folder)


@pytest.mark.parametrize("part", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_damaged_json_is_reported(folder: Path, part: str) -> None:
    (folder / part).write_text((folder / part).read_text()[:40])
    with pytest.raises(CheckpointError, match=Path(part).name.replace(".", r"\.")):
        checkpoint.load(folder)


@pytest.mark.parametrize("weight_map", [{}, [1], 3, {"conv_in.bias": 1}, None])
def test_a_damaged_index_is_reported(pipe: DDIMPipeline, folder: Path, weight_map: Any) -> None:
    checkpoint.save(pipe, folder, max_shard_size="40KB")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for read in (checkpoint.verify, checkpoint.load):
        with pytest.raises(CheckpointError, match="weight_map names no files"):
            read(folder)


def test_loading_reads_every_byte_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Tensor] = []
    own = integrity.tensor_checksum
    monkeypatch.setattr(integrity, "tensor_checksum", lambda tensor: hashed.append(tensor) or own(tensor))
    checkpoint.load(folder)
    assert len(hashed) == len(load_file(folder / WEIGHTS))


def test_every_flipped_bit_is_found_or_harmless(folder: Path) -> None:
    data, before = (folder / WEIGHTS).read_bytes(), load_file(folder / WEIGHTS)
    choose, found = random.Random(0), 0
    for position in [*(choose.randrange(len(data)) for _ in range(25)), *range(8, 28)]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << choose.randrange(8)
        (folder / WEIGHTS).unlink()  # tensors of an earlier turn may still be mapped to it
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            checkpoint.verify(folder)
        except CheckpointError:
            found += 1
        else:
            after = load_file(folder / WEIGHTS)
            assert all(torch.equal(after[name], before[name]) for name in before)
    assert found > 30


def test_a_float_pipeline_is_no_checkpoint(tiny_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not quantized by tcaq"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def float_bytes(tiny_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> int:
    path = tmp_path_factory.mktemp("float")
    unet = tiny_pipeline(channels=(112, 168, 224)).unet
    assert unet.num_parameters() >= 10_000_000
    unet.save_pretrained(path)
    return (path / WEIGHTS.name).stat().st_size


@pytest.mark.parametrize(("bits", "share"), [(4, 0.14), (8, 0.27)])
def test_size_of_ten_million_parameters(
    tiny_pipeline: Callable[..., Any], float_bytes: int, tmp_path: Path, bits: int, share: float
) -> None:
    unet = tiny_pipeline(channels=(112, 168, 224)).unet
    plan = resolve(unet, default_plan(unet, bits, bits))
    groups = StepGroups(boundaries=tuple(20.0 * g for g in range(1, 50)))
    insert(unet, plan, attach_clock(unet, groups))
    checkpoint.pack(unet, TcaqConfig(plan=plan, groups=groups))
    unet.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS.name).stat().st_size <= share * float_bytes


def test_equal_models_are_saved_as_equal_bytes(tiny_pipeline, quantized_tiny, tmp_path):
    pipe = quantized_tiny(tiny_pipeline())
    written = set()
    for attempt in range(6):  # safetensors alone would order the metadata differently in most of these
        checkpoint.save(pipe, tmp_path / str(attempt))
        written.add((tmp_path / str(attempt) / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len(written) == 1
