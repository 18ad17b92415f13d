"""The folder of an exported pipeline: a diffusers pipeline directory whose denoiser is a model of another format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import nn

from tcaq.errors import CheckpointError, UsageError
from tcaq.export.example import Example, example_of, first_call
from tcaq.export.interface import Interface
from tcaq.export.runtime import ExportedDenoiser, Predict
from tcaq.export.traceable import check_exportable
from tcaq.models.class_names import keep_class_names
from tcaq.models.denoiser import find_denoiser
from tcaq.processor import has_vnni
from tcaq.records import read_json, write_json

CARD, INDEX, CONFIG = "tcaq_export.json", "model_index.json", "config.json"
REMEDY = "Export the checkpoint again with `tcaq export`"


def write_folder(
    pipe: DiffusionPipeline, folder: Path, form: str, file: str, write: Callable[[nn.Module, Example, Path, bool], None],
    vnni: bool,
) -> None:  # fmt: skip
    """Export a pipeline.

    Args: form: name of the format; file: of the model, inside the denoiser's folder; write: exports a denoiser to a path; vnni: it
        will only run on processors with VNNI instructions.
    Raises: UsageError if `folder` holds something else or is the current one; ModelError if the denoiser cannot be exported:
        nothing is written then.
    """
    folder = folder.resolve()
    if folder == Path.cwd():
        raise UsageError(f"{folder} is the current folder, which an export would replace; name another one")
    if folder.exists() and any(folder.iterdir()) and not (folder / CARD).is_file():
        raise UsageError(f"{folder} is not empty and holds no export; name a new folder")
    name, denoiser = find_denoiser(pipe)
    check_exportable(denoiser)
    example = example_of(denoiser, first_call(pipe))
    staging = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / name).mkdir(parents=True)
    try:
        write(denoiser, example, staging / name / file, vnni)
        for part, component in pipe.components.items():
            if part != name and hasattr(component, "save_pretrained"):
                component.save_pretrained(staging / part)
        _describe(
            pipe, name, denoiser, staging, {"format": form, "vnni": vnni, "interface": example.interface.to_json()}
        )
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(pipe: DiffusionPipeline, name: str, denoiser: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Write the card and what diffusers reads; about: what the card says beside where the denoiser is."""
    config = {
        k: v for k, v in cast(Any, denoiser).config.items() if k != "quantization_config" and not k.startswith("_")
    }
    write_json(folder / name / CONFIG, config)
    keep_class_names(pipe)
    index = {k: v for k, v in pipe.config.items() if k != "_name_or_path"}
    write_json(folder / INDEX, index | {"_class_name": type(pipe).__name__, name: [None, None]})
    files = sorted(path.name for path in (folder / name).iterdir() if path.name != CONFIG)
    digests = {file: _digest(folder / name / file) for file in files}
    write_json(folder / CARD, about | {"component": name, "sha256": digests})


def read_folder(folder: Path, form: str, file: str, open_: Callable[[Path], Predict]) -> DiffusionPipeline:
    """Load what `write_folder` wrote, with a denoiser that runs in the other format's own runtime.

    Raises: CheckpointError if a file is missing or damaged, the export is of another format, or made for processors with VNNI
        while this one has none.
    """
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder} holds no export: {CARD} is missing. {REMEDY}")
    card = cast("dict[str, Any]", read_json(folder / CARD))
    if card.get("format") != form:
        raise CheckpointError(f"{folder} holds an export to {card.get('format')!r}, not to {form!r}")
    if "interface" not in card:
        raise CheckpointError(f"{folder} was exported by an earlier version, which did not say its inputs. {REMEDY}")
    if card.get("vnni") and has_vnni() is False:  # None: it cannot be asked
        raise CheckpointError(
            f"{folder} was exported with --vnni, and this processor has no VNNI instructions, without which its sums are wrong. "
            f"{REMEDY} without --vnni"
        )
    name = card["component"]
    for part, digest in card["sha256"].items():
        path = folder / name / part
        if not path.is_file() or _digest(path) != digest:
            raise CheckpointError(f"{path} is missing or damaged. {REMEDY}")
    config = FrozenDict(read_json(folder / name / CONFIG))
    interface = Interface.from_json(card["interface"])
    denoiser = ExportedDenoiser(open_(folder / name / file), config, card["sha256"], interface)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **{name: denoiser})
    return cast(DiffusionPipeline, pipe)


def export_format(folder: Path) -> str | None:
    """The format that a folder was exported to; None if it holds no export."""
    return str(read_json(folder / CARD).get("format")) if (folder / CARD).is_file() else None


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
