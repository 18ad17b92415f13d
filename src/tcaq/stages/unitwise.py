"""What stages share that go through a denoiser unit by unit, each on what the units before it put out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from torch import nn

from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit
from tcaq.stages.cache import ActivationCache
from tcaq.stages.draw import PartsReplay, draw_parts, draw_windows


class Unitwise:
    """Replays drawn inputs up to any unit; what passed units put out is kept until the block ends.

    Attributes: units: by name; replay: gives a unit's inputs in the float and in the quantized stream.
    """

    def __init__(
        self, denoiser: nn.Module, units: list[Unit], trajectories: Trajectories, *,
        inputs: int, batch: int, seed: int, memory: float, spill: Path | None = None, stretch: int = 1,
    ) -> None:  # fmt: skip
        """Draw `inputs` inputs by `seed`.

        Args: memory: GiB of activations kept in memory; spill: folder for the rest (None: the system's place for such files);
            stretch: how many steps of an image are drawn in a row, at least.
        """
        self.denoiser = denoiser
        self.units = {unit.name: unit for unit in units}
        self.cache = ActivationCache(int(memory * 2**30), spill)
        parts = (
            draw_parts(trajectories, inputs, seed)
            if stretch == 1
            else draw_windows(trajectories, inputs, stretch, seed)
        )
        self.replay = PartsReplay(denoiser, units, parts, batch, self.cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cache.__exit__(kind, error, trace)
