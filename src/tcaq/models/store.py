"""Where large tensors are kept: on the CPU, in memory up to a budget, beyond it in files that are mapped and read page by page."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from tcaq.errors import RunError
from tcaq.records import TEMPORARY


class Store:
    """Copies tensors to where there is room for them, on the CPU.

    A tensor counts against the budget as long as somebody holds it. Pages of a mapped file are not the process's own memory: the
    system drops them when it needs the room, and reads them again.
    """

    def __init__(self, budget: float = math.inf, folder: Path | None = None) -> None:
        """Keep at most `budget` bytes in memory; files go into `folder` (None: the system's place for temporary files)."""
        self.budget, self.folder, self.used = budget, folder, 0

    def keep(self, value: Tensor) -> Tensor:
        """A contiguous copy of a tensor. Raises: RunError if it must go to disk and the disk is full."""
        return self.gather([value], value.shape, value)

    def gather(self, pieces: Iterable[Tensor], shape: Iterable[int], like: Tensor) -> Tensor:
        """One contiguous tensor of pieces that are made one after another.

        Args: pieces: in the order in which they lie in the whole, as x[0], x[1], ... do in x; shape: of the whole; like: a tensor
            of its dtype.
        Raises: RunError if it must go to disk and the disk is full; ValueError if the pieces make another number of elements.
        """
        shape = torch.Size(shape)
        size = shape.numel() * like.element_size()
        if self.used + size > self.budget and size:
            return self._on_disk(pieces, shape, like)
        whole = torch.empty(shape, dtype=like.dtype)
        flat, end = whole.view(-1), 0
        for piece in pieces:
            start, end = end, end + piece.numel()
            flat[start:end].view(piece.shape).copy_(piece)
        _check(end, shape)
        self.used += size
        weakref.finalize(whole, self._release, size).atexit = False
        return whole

    def _release(self, size: int) -> None:
        self.used -= size

    def _on_disk(self, pieces: Iterable[Tensor], shape: torch.Size, like: Tensor) -> Tensor:
        """Bytes as they come, in a file that goes when the tensor goes, or when the process ends, however it ends."""
        # named as what a killed process leaves behind in a run directory, which the next one clears away
        handle, name = tempfile.mkstemp(prefix=".trajectories-", suffix=TEMPORARY, dir=self.folder)
        path, written = Path(name), 0
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    flat = piece.detach().to(like.dtype).cpu().contiguous().reshape(-1)
                    file.write(flat.view(torch.uint8).numpy().data)
                    written += len(flat)
            _check(written, shape)
            whole = torch.from_file(name, shared=False, size=shape.numel(), dtype=like.dtype).view(shape)
        except OSError as error:
            path.unlink()
            size = shape.numel() * like.element_size()
            raise RunError(
                f"trajectories of {size} bytes, more than memory may hold, cannot be put on disk in {path.parent}: {error}. "
                "Free some disk, or raise the memory budget"
            ) from error
        except BaseException:
            path.unlink()
            raise
        try:
            path.unlink()  # its bytes stay while they are mapped
        except PermissionError:  # Windows: only when nobody holds it any more
            weakref.finalize(whole, _remove, path)
        return whole


def _check(count: int, shape: torch.Size) -> None:
    if count != shape.numel():
        raise ValueError(f"pieces of {count} elements do not make a tensor of shape {tuple(shape)}")


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
