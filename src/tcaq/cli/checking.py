"""What can be known to be wrong before anything is sampled."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from tcaq.checkpoint import describe
from tcaq.cli.app import notes
from tcaq.cli.models import REFERENCE
from tcaq.errors import ModelError, UsageError
from tcaq.evaluate.features import FeatureExtractor, load_features
from tcaq.evaluate.sampling import PURPOSE
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import weights_hash
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.recipes.quantize import RUN_FOLDER, dtype_of
from tcaq.runs import Run
from tcaq.spec.conditions import Conditions

BUNDLED = (1, 32, 32)
"""Channels, height and width of the images that the bundled features were trained on; of others they say nothing."""


def check_asked(pipe: DiffusionPipeline, steps: int, conditions: Conditions | None) -> None:
    """Raises: UsageError for more steps than the scheduler has, or classes that the model has not."""
    known = pipe.scheduler.config.get("num_train_timesteps")
    if known is not None and steps > known:
        raise UsageError(
            f"--steps {steps}: {type(pipe.scheduler).__name__} of this model has {known}; give at most that"
        )
    config = getattr(find_denoiser(pipe)[1], "config", None)
    count = getattr(config, "num_embeds_ada_norm", None) or getattr(config, "num_class_embeds", None)
    labels = () if conditions is None else conditions.labels
    if isinstance(count, int) and (wrong := [str(label) for label in labels if label >= count]):
        raise UsageError(f"--labels {','.join(wrong)}: the model has classes 0 to {count - 1}")


def check_reference(folder: Path, original: DiffusionPipeline) -> None:
    """Raises: UsageError if the float model is not the one that a folder's run began with."""
    denoiser = find_denoiser(original)[1]
    if not (folder / RUN_FOLDER).is_dir() or describe(folder)[1].dtype != dtype_of(denoiser):
        return  # an export, or weights that were cast before they were quantized: nothing to compare
    if Run.read(folder / RUN_FOLDER).identity["weights"] != weights_hash(denoiser):
        raise UsageError(
            f"--reference: its weights are not those that {folder} was quantized from; give that float model"
        )


def find_features(
    pipe: DiffusionPipeline, name: str | None, conditions: Conditions | None, real: Path | None = None
) -> FeatureExtractor | None:
    """An extractor that has seen one image of the model; without a name the bundled one where it fits, else none.

    Raises: UsageError or ModelError if it cannot measure the model's images.
    """
    image = sample(pipe, image_seeds(PURPOSE, 0, 0, 1), 1, conditions)
    if name is None and tuple(image.shape[1:]) != BUNDLED:
        if real is not None:
            raise UsageError(f"--real {real}: say with --features by which extractor images are compared with it")
        notes.print(
            "The bundled features are not for images of this size: measured is only how close both models' images are. "
            "Distances to data need --features, and most extractors --real."
        )
        return None
    extractor = load_features(name or REFERENCE)
    try:
        extractor(image)
    except RuntimeError as error:
        raise ModelError(
            f"--features {extractor.name} fails on this model's images, {list(image.shape[1:])}: {error}"
        ) from error
    return extractor
