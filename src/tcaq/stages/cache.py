"""A store of unit outputs that stays within a memory budget and puts the rest on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tcaq.errors import RunError
from tcaq.records import TEMPORARY

Key = tuple[str, str, int]
"""Stream (float or quantized), unit, batch."""


class ActivationCache:
    """Tensors by key, on the CPU. Beyond the budget they go to a temporary folder, which is removed at the end."""

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        """Hold at most `budget` bytes in memory; spill below `folder` (None: the system's place for temporary files)."""
        self.budget, self.used = budget, 0
        self._memory: dict[Key, Tensor] = {}
        self._disk: dict[Key, Path] = {}
        # named as what a killed process leaves behind in a run directory, which the next one clears away
        self._folder = tempfile.TemporaryDirectory(prefix=".cache-", suffix=TEMPORARY, dir=folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.clear()
        self._folder.cleanup()

    def __contains__(self, key: Key) -> bool:
        return key in self._memory or key in self._disk

    def put(self, key: Key, value: Tensor) -> None:
        """Store a tensor. Raises: RunError if it must spill and the disk is full."""
        size = value.numel() * value.element_size()
        if self.used + size <= self.budget:
            self._memory[key] = value.cpu() if value.device.type != "cpu" else value.clone()
            self.used += size
            return
        path = Path(self._folder.name) / f"{len(self._disk)}.safetensors"
        try:
            save_file({"value": value.contiguous()}, path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"the activation cache cannot spill {size} bytes to {path.parent}: {error}. "
                "Free some disk, or raise the memory budget"
            ) from error
        self._disk[key] = path

    def get(self, key: Key) -> Tensor:
        """The stored tensor."""
        return self._memory[key] if key in self._memory else load_file(self._disk[key])["value"]
