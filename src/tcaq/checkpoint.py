"""Checkpoints: diffusers pipeline directories whose denoiser holds packed integer codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tcaq.errors import CheckpointError, TcaqError
from tcaq.models.adapters import refuse_fusing
from tcaq.models.card import write_card
from tcaq.models.class_names import keep_class_names
from tcaq.models.config import QuantMethod, TcaqConfig
from tcaq.models.denoiser import COMPONENTS
from tcaq.models.integrity import REMEDY, Seal, check_names
from tcaq.models.load import UNREADABLE, missing_extra
from tcaq.models.quantizer import TcaqQuantizer, drop_float_weights, register
from tcaq.records import flush

INDEX = "model_index.json"
STAGING = ".saving-"


def pack(denoiser: nn.Module, config: TcaqConfig) -> None:
    """Make a denoiser that was quantized in memory what `from_pretrained` would give: only packed codes stay.

    Its outputs do not change; float mode is gone afterwards.
    """
    drop_float_weights(denoiser)
    model = cast(Any, denoiser)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = TcaqQuantizer(config)
    model.register_to_config(quantization_config=config)
    refuse_fusing(model)


def save(pipe: DiffusionPipeline, folder: Path, max_shard_size: int | str = "10GB") -> None:
    """Write a pipeline whose denoiser was packed; an interrupted save never looks whole.

    Everything is written and synced in a hidden folder inside `folder` and moved from there, the file that makes a pipeline of
    it last. Other files in `folder` stay; an older checkpoint there is replaced.

    Raises: CheckpointError if the folder cannot be written (disk full, no permission).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(f"{STAGING}*"):
            shutil.rmtree(left_over)
        with TemporaryDirectory(prefix=STAGING, dir=folder) as staging:
            keep_class_names(pipe)
            pipe.save_pretrained(staging, safe_serialization=True, max_shard_size=max_shard_size)
            write_card(pipe, describe(Path(staging))[1], Path(staging))
            _publish(Path(staging), folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the checkpoint to {folder}: {error}. Make room there, or choose another folder"
        ) from error


def _order_metadata(path: Path) -> None:
    """Sort the metadata keys in a safetensors header: it writes them in random order, and equal models want equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > size:
            raise CheckpointError(
                f"{path} has a header that cannot be put in order; report this with the model's config"
            )
        file.seek(8)
        file.write(ordered.ljust(size))


def _publish(staging: Path, folder: Path) -> None:
    for path in staging.rglob("*.safetensors"):
        _order_metadata(path)
    for path in staging.rglob("*"):
        flush(path)
    (folder / INDEX).unlink(missing_ok=True)
    flush(folder)
    for part in sorted(staging.iterdir(), key=lambda path: path.name == INDEX):
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        if part.name == INDEX:
            flush(folder)
        os.replace(part, target)
    flush(folder)


def load(folder: Path | str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Load a pipeline that `save` or `save_pretrained` wrote, with the checks of `verify`.

    Args: dtype: of everything that is not quantized; by default as it was saved.
    Raises: CheckpointError saying which file is damaged and what to do.
    """
    register()
    folder = Path(folder)
    _sealed(folder)  # the bytes of the tensors are checked while they are read
    recorded = describe(folder)[1].torch_dtype
    # the parts around a denoiser in half precision must be in it, too
    asked = dtype or (recorded if recorded != torch.float32 else None)
    options: dict[str, Any] = {} if asked is None else {"dtype": asked}
    try:
        return cast(DiffusionPipeline, DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options))
    except TcaqError:
        raise
    except ImportError as error:
        raise missing_extra(error) from error
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} cannot be loaded: {error}. {REMEDY}") from error


def describe(folder: Path) -> tuple[str, TcaqConfig]:
    """Name and quantization config (plan, step groups, recipe) of a checkpoint's denoiser, without its tensors.

    Raises: CheckpointError if the folder holds no complete checkpoint.
    """
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no complete checkpoint: {INDEX} is missing. Run the quantization again to finish it"
        )
    index = _read(folder / INDEX)
    for name in COMPONENTS:
        if name in index:
            config = _read(folder / name / "config.json").get("quantization_config")
            if isinstance(config, dict) and config.get("quant_method") == QuantMethod.TCAQ.value:
                return name, cast(TcaqConfig, TcaqConfig.from_dict(config))
    raise CheckpointError(f"{folder} is a diffusers pipeline, but its denoiser was not quantized by tcaq")


def verify(folder: Path) -> None:
    """Check that a checkpoint's denoiser is complete and holds the bytes that were saved; builds no model.

    Raises: CheckpointError naming the file or tensor that is missing or damaged.
    """
    files, seal = _sealed(folder)
    found: list[str] = []
    for file in files:
        tensors = load_file(file)
        seal.check_tensors(tensors)
        found += tensors
    check_names(found, seal.tensors)


def _sealed(folder: Path) -> tuple[list[Path], Seal]:
    """The denoiser's files, which belong together and to its config, and what they should hold."""
    name, config = describe(folder)
    files = _weight_files(folder / name)
    seal = Seal.read(files)
    seal.check_config(config.checksum)
    return files, seal


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    shards = _read(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map names no files. {REMEDY}")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. {REMEDY}")
    return content
