"""What a user may name as MODEL: `reference`, a checkpoint of ours, a local diffusers directory, or a Hub id."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from tcaq.checkpoint import INDEX, load
from tcaq.cli import options as opt
from tcaq.cli.app import notes
from tcaq.cli.options import Execution
from tcaq.errors import ModelError, UsageError
from tcaq.export import CARD, ExportedDenoiser, export_format, load_onnx, load_openvino
from tcaq.integer.lower import lower
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import load_pipeline
from tcaq.recipes.quantize import RUN_FOLDER
from tcaq.reference import load_pipeline as load_reference

REFERENCE = "reference"
READERS = {"onnx": load_onnx, "openvino": load_openvino}


def open_float(model: str) -> DiffusionPipeline:
    """A float pipeline. Raises: ModelError."""
    return load_reference() if model == REFERENCE else load_pipeline(model)


def open_quantized(folder: Path) -> DiffusionPipeline:
    """A checkpoint of ours, verified, or what `tcaq export` made of it. Raises: ModelError, CheckpointError, MissingExtraError."""
    form = export_format(folder)
    if form is not None:
        return open_export(folder, form)
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give one that `tcaq quantize --output` wrote")
    if (folder / RUN_FOLDER).is_dir() and not (folder / INDEX).is_file():
        raise ModelError(
            f"the quantization in {folder} is not finished; run the same `tcaq quantize` again and it goes on"
        )
    return load(folder)


def open_export(folder: Path, form: str) -> DiffusionPipeline:
    """An exported pipeline. Raises: ModelError if its format is of a later version."""
    if form not in READERS:
        raise ModelError(f"{folder} holds an export to {form!r}; this version of tcaq runs {', '.join(READERS)}")
    return READERS[form](folder)


def open_any(model: str) -> DiffusionPipeline:
    """A float pipeline or a checkpoint of ours, whichever the name means."""
    folder = Path(model)
    ours = (folder / RUN_FOLDER).is_dir() or (folder / CARD).is_file()
    return open_quantized(folder) if ours else open_float(model)


def placed(pipe: DiffusionPipeline, device: str) -> DiffusionPipeline:
    """The pipeline on a device; convolutions compute in all of float32 there, as on the CPU and unlike PyTorch's default on GPUs.

    Raises: UsageError for a device that is not there, or of which what was exported knows nothing.
    """
    if device == opt.DEVICE:
        return pipe
    if isinstance(find_denoiser(pipe)[1], ExportedDenoiser):
        raise UsageError(f"--device {device}: exported models run on the CPU; leave --device out")
    try:
        there = torch.device(device)
        torch.zeros(1, device=there).item()  # a device without data has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device}: there is no such device ({reason}); cpu is there always") from error
    torch.backends.cudnn.allow_tf32 = False
    return pipe.to(there)


def executed(pipe: DiffusionPipeline, execution: Execution) -> DiffusionPipeline:
    """The pipeline, lowered if asked for; what stays in float is said on standard error. Raises: UsageError for a float model."""
    if execution is Execution.INTEGER and not isinstance(find_denoiser(pipe)[1], ExportedDenoiser):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            lowering = lower(pipe)
        for line in [f"warning: {warning.message}" for warning in caught] or lowering.summary().splitlines():
            notes.print(line, highlight=False)
    return pipe
