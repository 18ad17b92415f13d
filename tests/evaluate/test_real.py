from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tcaq.errors import DataError
from tcaq.evaluate import real
from tcaq.evaluate.features import FeatureExtractor
from tcaq.evaluate.real import load_real, read_image


class Quarters(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].float().reshape(len(images), 2, -1).mean(2)


@pytest.fixture
def extractor() -> FeatureExtractor:
    return FeatureExtractor("quarters", Quarters(), num_features=2)


@pytest.fixture
def pictures(tmp_path: Path) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (7, 4, 4), dtype=np.uint8)
    (tmp_path / "deep").mkdir()
    for i, picture in enumerate(values):
        Image.fromarray(picture).save(tmp_path / ("deep" if i > 4 else "") / f"z{i}.png")
    return values


def test_folder_gives_the_moments_of_its_features(
    tmp_path: Path, pictures: np.ndarray, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "KEPT", 4)
    features = pictures.reshape(7, 2, -1).astype(np.float64).mean(2)
    found = load_real(tmp_path, extractor, batch_size=3)
    np.testing.assert_allclose(found.mean.numpy(), features.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(features.T), rtol=1e-5)
    assert found.real_features is not None
    assert found.real_features.shape == (4, 2)
    assert {tuple(row) for row in found.real_features.tolist()} <= {tuple(row) for row in features.tolist()}


def test_color_is_kept(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "color.png")
    assert np.array_equal(read_image(tmp_path / "color.png").numpy(), values.transpose(2, 0, 1))


@pytest.mark.parametrize("names", [("mean", "covariance"), ("mu", "sigma")])
def test_statistics_file(tmp_path: Path, extractor: FeatureExtractor, names: tuple[str, str]) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **{names[0]: np.array([1.0, 2.0]), names[1]: np.array([[3.0, 0.5], [0.5, 4.0]])})
    found = load_real(path, extractor)
    assert found.mean.tolist() == [1.0, 2.0]
    assert found.covariance.tolist() == [[3.0, 0.5], [0.5, 4.0]]
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    assert found.real_features is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": np.zeros(2)}, "neither mean and covariance"),
        ({"mean": np.zeros(3), "covariance": np.zeros((3, 3))}, "the extractor gives 2 features"),
        ({"mean": np.zeros(2), "covariance": np.eye(2), "real_features": np.zeros((4, 3))}, r"expected \[N, 2\]"),
    ],
)
def test_statistics_that_do_not_fit(
    tmp_path: Path, extractor: FeatureExtractor, content: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **content)
    with pytest.raises(DataError, match=message):
        load_real(tmp_path / "data.npz", extractor)


def test_damaged_files_are_named(tmp_path: Path, extractor: FeatureExtractor, pictures: np.ndarray) -> None:
    (tmp_path / "data.npz").write_bytes(b"not a zip archive")
    with pytest.raises(DataError, match=r"data\.npz cannot be read"):
        load_real(tmp_path / "data.npz", extractor)
    (tmp_path / "z3.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"z3\.png is not a readable picture"):
        load_real(tmp_path, extractor)


def test_pictures_of_unequal_size_are_named(tmp_path: Path, extractor: FeatureExtractor, pictures: np.ndarray) -> None:
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "z3.png")
    with pytest.raises(DataError, match=r"z3\.png is \[1, 5, 4\]"):
        load_real(tmp_path, extractor)


def test_nothing_to_read(tmp_path: Path, extractor: FeatureExtractor) -> None:
    with pytest.raises(DataError, match="holds 0 pictures"):
        load_real(tmp_path, extractor)
    with pytest.raises(DataError, match="neither a folder"):
        load_real(tmp_path / "absent", extractor)
