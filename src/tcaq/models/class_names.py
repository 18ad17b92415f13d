"""The classes that a class-conditional pipeline has names for (diffusers' DiTPipeline)."""

from __future__ import annotations

from diffusers import DiffusionPipeline


def named_classes(pipe: DiffusionPipeline) -> dict[int, str]:
    """Names by class number, in order; several names of a class have commas between. Empty if the pipeline knows none."""
    names: dict[int, list[str]] = {}
    for name, number in (getattr(pipe, "labels", None) or {}).items():
        names.setdefault(int(number), []).append(name)
    return {number: ", ".join(sorted(names[number])) for number in sorted(names)}


def keep_class_names(pipe: DiffusionPipeline) -> None:
    """Have `save_pretrained` write the names of classes, which diffusers reads from a pipeline's index but leaves out again."""
    if names := named_classes(pipe):
        pipe.register_to_config(id2label={str(number): name for number, name in names.items()})
