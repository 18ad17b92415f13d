"""What a user may name as MODEL: `reference`, a checkpoint of ours, a local diffusers directory, or a Hub id."""

from __future__ import annotations

import warnings
from pathlib import Path

from diffusers import DiffusionPipeline

from tcaq.checkpoint import INDEX, load
from tcaq.cli.app import notes
from tcaq.cli.options import Execution
from tcaq.errors import ModelError
from tcaq.integer.lower import lower
from tcaq.models.load import load_pipeline
from tcaq.recipes.quantize import RUN_FOLDER
from tcaq.reference import load_pipeline as load_reference

REFERENCE = "reference"


def open_float(model: str) -> DiffusionPipeline:
    """A float pipeline. Raises: ModelError."""
    return load_reference() if model == REFERENCE else load_pipeline(model)


def open_quantized(folder: Path) -> DiffusionPipeline:
    """A checkpoint of ours, verified. Raises: ModelError, CheckpointError."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give one that `tcaq quantize --output` wrote")
    if (folder / RUN_FOLDER).is_dir() and not (folder / INDEX).is_file():
        raise ModelError(
            f"the quantization in {folder} is not finished; run the same `tcaq quantize` again and it goes on"
        )
    return load(folder)


def open_any(model: str) -> DiffusionPipeline:
    """A float pipeline or a checkpoint of ours, whichever the name means."""
    folder = Path(model)
    return open_quantized(folder) if (folder / RUN_FOLDER).is_dir() else open_float(model)


def executed(pipe: DiffusionPipeline, execution: Execution) -> DiffusionPipeline:
    """The pipeline, lowered if asked for; what stays in float is said on standard error. Raises: UsageError for a float model."""
    if execution is Execution.INTEGER:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            lowering = lower(pipe)
        for line in [f"warning: {warning.message}" for warning in caught] or lowering.summary().splitlines():
            notes.print(line, highlight=False)
    return pipe
