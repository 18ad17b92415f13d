"""The real data that generated images are compared with: a folder of images, or its statistics in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tcaq.errors import DataError
from tcaq.evaluate.features import FeatureExtractor
from tcaq.evaluate.metrics import Moments

SUFFIXES = (".png", ".jpg", ".jpeg")
KEYS = (("mean", "covariance"), ("mu", "sigma"))  # ours, and the names other FID programs write


@dataclass(frozen=True)
class RealStatistics:
    """Features of real data: mean float64 [D], covariance float64 [D, D], and up to `KEPT` of the features [N, D]."""

    mean: Tensor
    covariance: Tensor
    real_features: Tensor | None


KEPT = 5000
"""How many single features are kept for the kernel distance."""


def read_image(path: Path) -> Tensor:
    """Read one picture as uint8 [C, H, W], C = 1 for gray files and 3 for all others. Raises: DataError."""
    try:
        with Image.open(path) as image:
            values = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is not a readable picture ({error})") from error
    tensor = torch.from_numpy(values.copy())
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def load_real(path: Path, extractor: FeatureExtractor, batch_size: int = 100, seed: int = 0) -> RealStatistics:
    """Features of real data.

    Args: path: a folder of .png or .jpg pictures of one size (searched through), or an .npz with `mean` and
    `covariance` (or `mu` and `sigma`) of this extractor's features and, optionally, `real_features` [N, D].
    seed: draws the features kept for the kernel distance.
    Raises: DataError if there is nothing to read or it does not fit.
    """
    if path.is_dir():
        return _from_folder(path, extractor, batch_size, seed)
    if path.is_file() and path.suffix == ".npz":
        return _from_file(path, extractor.num_features)
    raise DataError(f"{path} is neither a folder of pictures nor an .npz file of feature statistics")


def _from_folder(folder: Path, extractor: FeatureExtractor, batch_size: int, seed: int) -> RealStatistics:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(paths) < 2:
        raise DataError(f"{folder} holds {len(paths)} pictures ({', '.join(SUFFIXES)}), at least 2 are needed")
    kept = set(torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:KEPT].tolist())
    moments, features, shape = Moments.empty(extractor.num_features), [], None
    for start in range(0, len(paths), batch_size):
        images = []
        for file in paths[start : start + batch_size]:
            images.append(read_image(file))
            shape = shape or images[-1].shape
            if images[-1].shape != shape:
                raise DataError(f"{file} is {list(images[-1].shape)}, those before it {list(shape)}; make all alike")
        batch = extractor.extract(torch.stack(images), batch_size)
        moments.update(batch)
        features.append(batch[[start + i in kept for i in range(len(batch))]])
    return RealStatistics(moments.mean, moments.covariance, torch.cat(features))


def _from_file(path: Path, width: int) -> RealStatistics:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for pair in KEYS for name in pair if name in file}
            features = torch.from_numpy(file["real_features"]).float() if "real_features" in file else None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read as feature statistics ({error})") from error
    names = next((pair for pair in KEYS if all(name in arrays for name in pair)), None)
    if names is None:
        raise DataError(f"{path} holds neither mean and covariance nor mu and sigma")
    mean, covariance = (arrays[name].double() for name in names)
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise DataError(
            f"{path} is of {list(mean.shape)} and {list(covariance.shape)}, the extractor gives {width} features; "
            "use statistics made with the same features"
        )
    if features is not None and (features.ndim != 2 or features.shape[1] != width):
        raise DataError(f"{path}: real_features is {list(features.shape)}, expected [N, {width}]")
    return RealStatistics(mean, covariance, features)
