"""Load the bundled reference: a diffusers pipeline, its feature extractor, and the statistics of its data. Offline."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from diffusers import DDIMPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file

from tcaq.errors import DataError, ModelError
from tcaq.reference.classifier import FEATURES, GarmentClassifier
from tcaq.reference.features import GarmentFeatures, ReferenceStatistics

FOLDER = Path(__file__).parent
REMEDY = "the installation is incomplete: install tcaq again, or build the files as docs/reference-model.md says"
STATISTICS = {"mean": (FEATURES,), "covariance": (FEATURES, FEATURES), "real_features": (None, FEATURES), "floor": ()}


def load_pipeline(folder: Path = FOLDER) -> DDIMPipeline:
    """Load the bundled DDIM pipeline (`UNet2DModel`, 1x32x32, noise prediction, 1000 training steps).

    Raises: ModelError if its files are missing or damaged.
    """
    model = folder / "model"
    if not (model / "model_index.json").is_file():
        raise ModelError(f"the bundled reference model is not at {model}; {REMEDY}")
    try:
        pipeline: DDIMPipeline = DDIMPipeline.from_pretrained(model, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the bundled reference model at {model} cannot be loaded ({error}); {REMEDY}") from error
    return pipeline


def load_classifier(path: Path = FOLDER / "classifier.safetensors") -> GarmentClassifier:
    """Load the bundled classifier, in evaluation mode.

    Raises: ModelError if its file is missing, damaged, or of another architecture.
    """
    if not path.is_file():
        raise ModelError(f"the bundled classifier is not at {path}; {REMEDY}")
    classifier = GarmentClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"the classifier at {path} cannot be loaded ({error}); {REMEDY}") from error
    return classifier.eval()


def load_statistics(path: Path = FOLDER / "statistics.npz") -> ReferenceStatistics:
    """Load the feature statistics of the real data.

    Raises: DataError if the file is missing or does not hold what it should.
    """
    if not path.is_file():
        raise DataError(f"the bundled statistics are not at {path}; {REMEDY}")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in STATISTICS}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"the statistics at {path} cannot be read ({error}); {REMEDY}") from error
    for name, shape in STATISTICS.items():
        given = arrays[name].shape
        if len(given) != len(shape) or any(n not in (None, m) for n, m in zip(shape, given, strict=True)):
            raise DataError(f"{path}: {name} has shape {list(given)}, expected {list(shape)}; {REMEDY}")
    return ReferenceStatistics(
        mean=torch.from_numpy(arrays["mean"]).double(),
        covariance=torch.from_numpy(arrays["covariance"]).double(),
        real_features=torch.from_numpy(arrays["real_features"]).float(),
        floor=float(arrays["floor"]),
    )


def load_features(folder: Path = FOLDER) -> GarmentFeatures:
    """Load the bundled feature extractor, uint8 [N, 1, 32, 32] to float32 [N, 64], with its data's statistics."""
    return GarmentFeatures(
        load_classifier(folder / "classifier.safetensors"), load_statistics(folder / "statistics.npz")
    )
