"""Fashion-MNIST as tensors, from Debian's `dataset-fashion-mnist` or any folder with the four IDX files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tcaq.errors import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": "train", "test": "t10k"}
CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped or not.

    Returns: uint8 tensor of the shape the file's header states.
    Raises: DataError if the header or the length is not that of an IDX file of bytes.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it starts with {raw[:4].hex()}, not 000008")
    dims = raw[3]
    if len(raw) < 4 + 4 * dims:
        raise DataError(f"{path} is truncated: it ends within its header of {dims} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=dims, offset=4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} is truncated: its header promises {shape}, it holds {values.size} values")
    return torch.from_numpy(values.reshape(shape).copy())


def _find(folder: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder} holds no {stem}[.gz]. Install Debian's package dataset-fashion-mnist, "
        "or pass a folder with the four IDX files of Fashion-MNIST"
    )


def load_images(split: str, folder: Path = DEBIAN_FOLDER) -> tuple[Tensor, Tensor]:
    """Load one split of Fashion-MNIST.

    Args: split: "train" (60 000) or "test" (10 000).
    Returns: images, uint8 [N, 1, 32, 32], the 28x28 originals padded by two black pixels; labels, int64 [N].
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    images = read_idx(_find(folder, f"{SPLITS[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{SPLITS[split]}-labels-idx1-ubyte"))
    return pad(images, (2, 2, 2, 2)).unsqueeze(1), labels.long()


def to_signal(images: Tensor) -> Tensor:
    """Map uint8 images [..] to the denoiser's range: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0
