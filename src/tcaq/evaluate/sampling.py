"""Sample a model for evaluation: resumable after every batch, and paired with another model image by image."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from time import perf_counter

import torch
from diffusers import DiffusionPipeline

from tcaq.evaluate.evaluate import Sampled, versions
from tcaq.evaluate.memory import track_peak
from tcaq.models.denoiser import find_denoiser
from tcaq.models.device import device_identity
from tcaq.models.identity import conditioners, sampler_identity
from tcaq.models.load import weights_hash
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import batches, record, sample
from tcaq.models.seeds import image_seeds
from tcaq.models.trajectories import Trajectories, predict
from tcaq.records import Record, canonical
from tcaq.runs import OnProgress, Run, silent
from tcaq.spec.conditions import Conditions

PURPOSE = "evaluation"
"""Seeds of evaluation images; calibration draws from another purpose, so the two never share noise."""
TRACED = 16
"""How many images' trajectories the per-step noise-prediction comparison uses."""


def sample_for_evaluation(
    pipe: DiffusionPipeline, work: Path, *, num: int, steps: int, seed: int, batch: int,
    conditions: Conditions | None = None, on_progress: OnProgress = silent,
) -> Sampled:  # fmt: skip
    """Sample `num` images, a batch a record, in a folder below `work` that belongs to this model, schedule, seed and batch.

    Another `num` takes from there what it needs and removes nothing. If it is no multiple of `batch`, its last, smaller batch is a
    record of its own even where a whole one begins alike: the last bits of a prediction depend on how many images there are.

    Args: conditions: what a conditional model is asked for (None: its defaults).
    Raises: RunError if something is left to sample and another process is sampling the same.
    """
    conditions = resolve_conditions(pipe, conditions)
    who = _identity(pipe, steps, seed, batch, conditions)
    parts: list[Record] = []

    def compute(item: str) -> Record:
        start, stop = map(int, item.split("-"))
        began = perf_counter()
        with track_peak() as peak:
            images = sample(pipe, image_seeds(PURPOSE, seed, start, stop), steps, conditions, start)
        return Record({"images": images}, {"seconds": perf_counter() - began, "peak_memory": peak.bytes})

    with Run.share(work / _name(who), who, on_progress) as run:
        items = [f"{chunk[0]}-{chunk[-1] + 1}" for chunk in batches(range(num), batch)]
        run.series("images", items, compute, lambda _, part: parts.append(part))
    return Sampled(
        images=torch.cat([part.tensors["images"] for part in parts]),
        seconds=sum(part.meta["seconds"] for part in parts),
        peak_memory=max(part.meta["peak_memory"] for part in parts),
    )


def trace(
    pipe: DiffusionPipeline, *, steps: int, seed: int, conditions: Conditions | None = None, images: int = TRACED
) -> Trajectories:  # fmt: skip
    """Trajectories of the first evaluation images under a (float) model."""
    return record(pipe, image_seeds(PURPOSE, seed, 0, images), steps, conditions)[1]


def with_predictions(sampled: Sampled, pipe: DiffusionPipeline, trajectories: Trajectories) -> Sampled:
    """`sampled` with the model's noise predictions on given inputs: the float trajectories, for both models alike."""
    eps = predict(find_denoiser(pipe)[1], trajectories)
    return Sampled(sampled.images, sampled.seconds, sampled.peak_memory, eps, trajectories.timesteps)


def _identity(
    pipe: DiffusionPipeline, steps: int, seed: int, batch: int, conditions: Conditions | None
) -> dict[str, object]:  # fmt: skip
    asked = {} if conditions is None else {"conditions": conditions.model_dump(mode="json")}
    return {
        "weights": weights_hash(find_denoiser(pipe)[1]), "pipeline": type(pipe).__name__, "scheduler": sampler_identity(pipe),
        "steps": steps, "seed": seed, "batch": batch, "versions": versions(),
    } | asked | device_identity(find_denoiser(pipe)[1]) | conditioners(pipe, decoders=True)  # fmt: skip


def _name(identity: dict[str, object]) -> str:
    return f"samples-{sha256(canonical(identity).encode()).hexdigest()[:12]}"
