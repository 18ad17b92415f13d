"""One checkpoint, the float model it was made from, and where things are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from tcaq.checkpoint import describe
from tcaq.models.inputs import Inputs
from tcaq.models.sampler import record
from tcaq.models.seeds import image_seeds
from tcaq.spec.conditions import Conditions


@dataclass(frozen=True)
class Bout:
    """Where contenders come from.

    Attributes: folder: the checkpoint; model: name of the float model; work: folder for what is built; load_float: loads the
        float model.
    """

    folder: Path
    model: str
    work: Path
    load_float: Callable[[], DiffusionPipeline]

    @property
    def conditions(self) -> Conditions | None:
        """What a conditional model is asked for: what the checkpoint was calibrated on."""
        return describe(self.folder)[1].conditions

    def calibration(self) -> list[Inputs]:
        """What tools calibrate with: calls of the float model."""
        seeds = image_seeds("bench calibration", 0, 0, 8)
        return list(record(self.load_float(), seeds, 8, self.conditions)[1].calls())
