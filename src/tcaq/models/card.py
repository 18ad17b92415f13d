"""The model card of a checkpoint: what it was made from, how, and how to load it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData, hf_hub_download, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]

from tcaq.models.config import TcaqConfig

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of the original's card that hold for what is made from it, too."""
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


def write_card(pipe: DiffusionPipeline, config: TcaqConfig, folder: Path) -> None:
    """Write the card into a checkpoint's folder, and the licence's text beside it if the original is a folder that has one."""
    source = str(getattr(pipe.config, "_name_or_path", None) or "")
    original = Path(source)
    (folder / CARD).write_text(card(pipe, config, source, metadata_of(source)), encoding="utf-8")
    for name in LICENSES:
        if source and (original / name).is_file():
            shutil.copyfile(original / name, folder / name)


def metadata_of(source: str) -> dict[str, Any]:
    """The fields at the head of the card of a folder or a Hub id; none if there is no card, or it cannot be reached."""
    if not source:
        return {}
    try:
        path = Path(source) / CARD if Path(source).is_dir() else Path(hf_hub_download(source, CARD))
        return dict(metadata_load(path) or {})
    except (OSError, ValueError, YAMLError):
        return {}


def is_repository(source: str) -> bool:
    """Whether a source is the id of a repository, and no folder, be it one that is there no more."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)) and not Path(source).exists()


def card(pipe: DiffusionPipeline, config: TcaqConfig, source: str, known: dict[str, Any]) -> str:
    """The card's text. Args: source: folder or Hub id of the original; known: the fields of its card."""
    # a folder's path tells others nothing: what it was made from itself does
    base = source if is_repository(source) else known.get("base_model")
    recipe = config.recipe
    calibration = recipe.get("calibration", {})
    asked = calibration.get("conditions") or {}
    made_from = "image-to-image" if asked.get("pictures") else "text-to-image" if asked.get("prompts") else None
    data = ModelCardData(
        library_name="diffusers", tags=["tcaq", "quantized", "diffusion"], base_model=base,
        base_model_relation="quantized" if base else None,
        pipeline_tag=made_from or "unconditional-image-generation",
        **{field: known[field] for field in CARRIED if field in known},
    )  # fmt: skip
    half = "" if config.dtype == "float32" else f", torch_dtype=torch.{config.dtype}"
    lines = [
        "---", data.to_yaml(), "---", "", f"# {type(pipe).__name__}, quantized", "",
        f"Made with tcaq from {base or 'a local model'}: recipe `{recipe.get('program', '?')}`, weights "
        f"{recipe.get('weights', '?')} bits, activations {recipe.get('activations', '?')} bits.", "",
        "```python", "import tcaq  # teaches diffusers to read it", f"from diffusers import {type(pipe).__name__}", "",
        f'pipe = {type(pipe).__name__}.from_pretrained("this-repository"{half})', "```", "",
        "## What is quantized", "", "| layers | kind | weight | inputs |", "|---|---|---|---|", *plan_rows(config), "",
        "## Calibration", "", *calibration_rows(config, calibration), "",
    ]  # fmt: skip
    if "license" not in known:
        lines += [
            "## Licence",
            "",
            "That of the original model, whose card was not at hand: look it up before you share this.",
            "",
        ]
    return "\n".join(lines)


def plan_rows(config: TcaqConfig) -> list[str]:
    """How many layers of each kind got which grids."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for layer in config.plan.layers:
        inputs = ", ".join(map(str, layer.inputs)) or f"float: {layer.reason}"
        counts[layer.kind, str(layer.weight or ""), inputs] += 1
    return [f"| {count} | {kind} | {weight} | {inputs} |" for (kind, weight, inputs), count in counts.items()]


def width_counts(config: TcaqConfig) -> str:
    """How many step groups have which width."""
    return ", ".join(f"{count} at {bits} bits" for bits, count in sorted(Counter(config.step_bits).items()))


def calibration_rows(config: TcaqConfig, calibration: dict[str, Any]) -> list[str]:
    """On what the grids were found."""
    asked = calibration.get("conditions") or {}
    rows = [
        f"- {calibration.get('images', '?')} images of {calibration.get('steps', '?')} steps, sampled from the model itself: "
        + (f"into {len(asked['pictures'])} pictures" if asked.get("pictures") else "no other data"),
        f"- {config.groups.count} step groups",
    ]
    rows += [f"- activations by step group: {width_counts(config)}"] if config.step_bits else []
    rows += [f"- {len(asked['prompts'])} prompts, such as: {asked['prompts'][0]}"] if asked.get("prompts") else []
    rows += [f"- {len(asked['labels'])} classes"] if asked.get("labels") else []
    return rows + ([f"- guidance {asked['guidance']:g}"] if asked.get("guidance") is not None else [])
