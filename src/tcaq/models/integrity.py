"""Checksums that travel inside safetensors files, so that a flipped bit is found however the file is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tcaq.errors import CheckpointError

TENSORS, CONFIG = "tcaq.crc32", "tcaq.config_crc32"
REMEDY = "Copy the checkpoint again from where it came from, or quantize the model again"


def tensor_checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's bytes, eight hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{crc32(flat.view(torch.uint8).numpy().data):08x}"


def config_checksum(config: Mapping[str, Any]) -> str:
    """CRC-32 of a configuration's canonical JSON, eight hexadecimal digits."""
    return f"{crc32(json.dumps(config, sort_keys=True).encode()):08x}"


@dataclass(frozen=True)
class Seal:
    """Checksums of everything that belongs to one saved denoiser; every shard carries all of them.

    Attributes: tensors: checksum by tensor name; config: checksum of its quantization_config.
    """

    tensors: Mapping[str, str] = field(default_factory=dict)
    config: str = ""

    @staticmethod
    def of(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Seal:
        """The seal of what is about to be saved."""
        return Seal({name: tensor_checksum(tensor) for name, tensor in tensors.items()}, config_checksum(config))

    def metadata(self) -> dict[str, str]:
        """As metadata of a safetensors file."""
        return {TENSORS: json.dumps(self.tensors, sort_keys=True, separators=(",", ":")), CONFIG: self.config}

    @staticmethod
    def read(files: Sequence[str | Path]) -> Seal:
        """The seal that the files share.

        Raises: CheckpointError naming the file that is missing, truncated or damaged, or that belongs to another save.
        """
        seals = {file: _read(file) for file in files}
        first = next(iter(seals.values()), Seal())
        strangers = [str(file) for file, seal in seals.items() if seal != first]
        if strangers:
            raise CheckpointError(f"{_few(strangers)}: not saved together with the files beside it. {REMEDY}")
        return first

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises: CheckpointError naming every tensor that differs from what was saved, or has no checksum."""
        unknown = [name for name in tensors if name not in self.tensors]
        if unknown:
            raise CheckpointError(
                f"{_few(unknown)}: no checksum is stored, so the file was rewritten by another program. "
                "Rewrite it with save_pretrained of the quantized model, which stores them"
            )
        differing = [name for name, tensor in tensors.items() if tensor_checksum(tensor) != self.tensors[name]]
        if differing:
            raise CheckpointError(f"{_few(differing)}: damaged, the bytes are not the ones that were saved. {REMEDY}")

    def check_config(self, checksum: str) -> None:
        """Raises: CheckpointError if the config read has another checksum than the one saved."""
        if self.config and checksum != self.config:
            raise CheckpointError(
                f"config.json: damaged, its quantization_config is not the one saved with the tensors. {REMEDY}"
            )


def check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises: CheckpointError naming every tensor that is missing or unexpected."""
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [f"missing: {_few(missing)}"] if missing else []
    problems += [f"unexpected: {_few(unexpected)}"] if unexpected else []
    if problems:
        raise CheckpointError(f"the checkpoint's tensors are not those of its plan; {'; '.join(problems)}. {REMEDY}")


def _read(file: str | Path) -> Seal:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return Seal(json.loads(metadata.get(TENSORS, "{}")), metadata.get(CONFIG, ""))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file} is missing, truncated or damaged ({error}). {REMEDY}") from error


def _few(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
