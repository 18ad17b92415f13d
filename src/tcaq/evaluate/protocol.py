"""Evaluate a quantized pipeline against its float original: sample both, pair them, score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline

from tcaq.evaluate.evaluate import Evaluation, Sampled, score
from tcaq.evaluate.features import DataStatistics, FeatureExtractor
from tcaq.evaluate.sampling import TRACED, sample_for_evaluation, trace, with_predictions
from tcaq.runs import OnProgress, silent
from tcaq.spec.conditions import Conditions


@dataclass(frozen=True)
class Protocol:
    """How both models are sampled and judged.

    Attributes: extractor: of features (None: no distances); work: folder for finished batches, so that an interrupted evaluation
        goes on, and models are not sampled twice; num: images; steps: sampling steps; seed: of the noise; batch: images at a time;
        real: statistics of real data (None: the extractor's own); conditions: what conditional models are asked for.
    """

    extractor: FeatureExtractor | None
    work: Path
    num: int
    steps: int
    seed: int
    batch: int = 32
    real: DataStatistics | None = None
    conditions: Conditions | None = None


def evaluate(
    float_pipe: DiffusionPipeline, quantized_pipe: DiffusionPipeline, protocol: Protocol, on_progress: OnProgress = silent
) -> tuple[Evaluation, Sampled, Sampled]:  # fmt: skip
    """Score a quantized pipeline; also returns what was sampled from the float and from the quantized model."""
    sampled = [
        sample_for_evaluation(
            pipe, protocol.work, num=protocol.num, steps=protocol.steps, seed=protocol.seed, batch=protocol.batch,
            conditions=protocol.conditions,
            on_progress=lambda stage, done, total, resumed, who=who: on_progress(f"{who} {stage}", done, total, resumed),
        )
        for who, pipe in (("float", float_pipe), ("quantized", quantized_pipe))
    ]  # fmt: skip
    on_progress("noise by step", 0, 3, False)
    trajectories = trace(
        float_pipe,
        steps=protocol.steps,
        seed=protocol.seed,
        conditions=protocol.conditions,
        images=min(TRACED, protocol.batch),
    )
    on_progress("noise by step", 1, 3, False)
    float_ = with_predictions(sampled[0], float_pipe, trajectories)
    on_progress("noise by step", 2, 3, False)
    quantized = with_predictions(sampled[1], quantized_pipe, trajectories)
    on_progress("noise by step", 3, 3, False)
    result = score(
        float_, quantized, protocol.extractor, steps=protocol.steps, scheduler=type(quantized_pipe.scheduler).__name__,
        seed=protocol.seed, real=protocol.real,
    )  # fmt: skip
    return result, float_, quantized
