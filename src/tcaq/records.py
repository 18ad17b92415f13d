"""What one step of a quantization produced, as tensors and plain values, in one file that is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tcaq.errors import RunError

JSON: TypeAlias = Any  # None, bool, int, float, str, or lists and string-keyed dicts of these

FORMAT = 1
TEMPORARY = ".tmp"  # suffix of files being written
_KEY = "tcaq"  # everything beside the tensors sits under one key: safetensors does not keep the order of several


@dataclass(frozen=True, eq=False)
class Record:
    """Tensors by name, and values that survive JSON unchanged (lists, not tuples; string keys)."""

    tensors: Mapping[str, Tensor]
    meta: Mapping[str, JSON] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and bytes of all tensors and of `meta`; computed once."""
        digest = hashlib.sha256(canonical(dict(self.meta)).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write one safetensors file, replacing `path` in one go. Equal records give equal bytes.

        Raises:
            RunError: it cannot be written; nothing of it is left behind, and an earlier file at `path` is untouched.
        """
        header = canonical({"format": FORMAT, "sha256": self.digest, "meta": dict(self.meta)})
        with replacing(path) as temporary:
            save_file(_independent(self.tensors), temporary, metadata={_KEY: header})

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read a file that `save` wrote, tensors on the CPU.

        Raises:
            RunError: the file is missing, truncated, altered, or from a newer format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_KEY])
                if header["format"] > FORMAT:
                    raise RunError(
                        f"{path} has format {header['format']}, this tcaq reads up to {FORMAT}. Update tcaq."
                    )
                record = cls({name: file.get_tensor(name) for name in sorted(file.keys())}, header["meta"])
            if record.digest != header["sha256"]:
                raise ValueError("its contents do not match its checksum")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            remedy = "Delete this file and run again: only the step that makes it, and what depends on it, is repeated."
            raise RunError(f"{path} is damaged or is not a record of tcaq ({error}). {remedy}") from error
        return record


def canonical(value: JSON) -> str:
    """The one JSON text of a value: keys sorted, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def write_json(path: Path, value: JSON) -> None:
    """Write indented JSON, replacing `path` in one go.

    Raises:
        RunError: it cannot be written.
        ValueError: `value` has a NaN or an infinity, which JSON does not know.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> JSON:
    """The value in a JSON file; RunError if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}).") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and move it to `path` once it is on disk.

    If the block raises, or the disk fails, the temporary file is removed and `path` stays what it was. A process that
    is killed can leave a temporary file behind, never a partial `path`.

    Raises:
        RunError: the file cannot be written, for instance because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)  # the new name, too
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written ({error}). {_remedy(error)}") from error
    finally:
        with suppress(OSError):  # it is gone, as it should be, or the error above says what is wrong
            temporary.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "code: 28" in str(error):  # safetensors wraps the error of the system in its own
        return "The disk is full: free some space and run again; all that was finished is kept."
    return "Check that the folder can be written to, then run again; all that was finished is kept."


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        result[name] = plain.clone() if address in seen else plain
        seen.add(address)
    return result
