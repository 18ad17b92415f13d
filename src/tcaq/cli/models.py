"""What a user may name as MODEL: `reference`, a checkpoint of ours, a local diffusers directory, or a Hub id."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from tcaq.checkpoint import INDEX, load
from tcaq.errors import ModelError
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
