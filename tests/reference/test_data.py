from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tcaq.errors import DataError
from tcaq.reference.data import load_images, read_idx, to_signal


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("zipped", [True, False])
def test_split_is_padded_by_two_black_pixels(tmp_path: Path, images: np.ndarray, zipped: bool) -> None:
    for name, values in (("images-idx3", images), ("labels-idx1", np.array([7, 0, 9], np.uint8))):
        raw = idx(values)
        path = tmp_path / f"t10k-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    padded, labels = load_images("test", tmp_path)
    expected = np.zeros((3, 1, 32, 32), np.uint8)
    expected[:, 0, 2:30, 2:30] = images
    assert padded.dtype == torch.uint8
    assert np.array_equal(padded.numpy(), expected)
    assert labels.tolist() == [7, 0, 9]


def test_signal_reaches_both_ends() -> None:
    assert to_signal(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "truncated: its header promises"),
        (lambda raw: raw[:6], "within its header"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "not an IDX file"),
        (lambda raw: b"", "not an IDX file"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, images: np.ndarray, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "damaged"
    path.write_bytes(damage(idx(images)))
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_truncated_gzip_is_named(tmp_path: Path, images: np.ndarray) -> None:
    path = tmp_path / "damaged.gz"
    path.write_bytes(gzip.compress(idx(images))[:-20])
    with pytest.raises(DataError, match=r"damaged\.gz cannot be read"):
        read_idx(path)


def test_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        load_images("train", tmp_path)


def test_unknown_split_lists_the_allowed_ones() -> None:
    with pytest.raises(DataError, match="allowed: train, test"):
        load_images("validation")
