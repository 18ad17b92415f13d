from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file

from tcaq.errors import DataError, ModelError
from tcaq.reference.classifier import GarmentClassifier
from tcaq.reference.load import load_classifier, load_features, load_pipeline, load_statistics


def statistics(kept: int = 7) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    features = draw.normal(size=(100, 64))
    return {
        "mean": features.mean(0),
        "covariance": np.cov(features.T),
        "real_features": features[:kept].astype(np.float32),
        "floor": np.float64(0.25),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "model")
    save_file(GarmentClassifier().state_dict(), tmp_path / "classifier.safetensors")
    np.savez(tmp_path / "statistics.npz", **statistics())
    return tmp_path


def test_pipeline_comes_back_as_saved(folder: Path) -> None:
    first, second = load_pipeline(folder), DDIMPipeline.from_pretrained(folder / "model")
    assert isinstance(first, DDIMPipeline)
    for name, value in second.unet.state_dict().items():
        assert torch.equal(first.unet.state_dict()[name], value), name


def test_features_carry_the_statistics(folder: Path) -> None:
    extractor, expected = load_features(folder), statistics()
    assert extractor.statistics is not None
    for name in ("mean", "covariance", "real_features"):
        value = getattr(extractor.statistics, name)
        assert np.array_equal(value.numpy(), expected[name]), name
    assert extractor.statistics.mean.dtype == torch.float64
    assert extractor.statistics.floor == 0.25
    assert extractor(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 64)


@pytest.mark.parametrize(
    ("load", "kind"),
    [
        (lambda folder: load_pipeline(folder), ModelError),
        (lambda folder: load_classifier(folder / "classifier.safetensors"), ModelError),
        (lambda folder: load_statistics(folder / "statistics.npz"), DataError),
    ],
)
def test_missing_files_name_the_remedy(tmp_path: Path, load, kind: type[Exception]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(kind, match=r"docs/reference-model\.md"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model/unet/diffusion_pytorch_model.safetensors", "classifier.safetensors"])
def test_truncated_weights_are_an_error(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_pipeline(folder) if name.startswith("model") else load_features(folder)


def test_truncated_statistics_are_an_error(folder: Path) -> None:
    path = folder / "statistics.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        load_statistics(path)


@pytest.mark.parametrize(("name", "shape"), [("mean", (63,)), ("covariance", (64,)), ("real_features", (5, 63))])
def test_statistics_of_other_features_are_an_error(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "statistics.npz", **{**statistics(), name: np.zeros(shape)})
    with pytest.raises(DataError, match=f"{name} has shape"):
        load_statistics(tmp_path / "statistics.npz")


def test_missing_entry_is_an_error(tmp_path: Path) -> None:
    rest = {name: value for name, value in statistics().items() if name != "floor"}
    np.savez(tmp_path / "statistics.npz", **rest)
    with pytest.raises(DataError, match="floor"):
        load_statistics(tmp_path / "statistics.npz")
