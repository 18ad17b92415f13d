"""The files the package ships: they are there, fit together, and are worth studying."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tcaq.evaluate import load_features as load_extractor
from tcaq.evaluate.metrics import Moments, frechet_distance
from tcaq.reference import load_features, load_pipeline, load_statistics
from tcaq.reference.data import DEBIAN_FOLDER, load_images, to_signal
from tcaq.reference.load import FOLDER

has_data = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")


def test_files_take_at_most_fifteen_megabytes() -> None:
    names = ("classifier.safetensors", "statistics.npz", "CARD.md")
    files: list[Path] = [FOLDER / name for name in names] + [p for p in (FOLDER / "model").rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_pipeline_is_what_the_card_says() -> None:
    pipeline = load_pipeline()
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    assert 1_000_000 <= parameters <= 3_000_000
    assert f"{parameters:,} parameters" in (FOLDER / "CARD.md").read_text()
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.unet.config.sample_size == 32


def test_no_path_of_the_machine_that_built_it_is_left() -> None:
    for path in (FOLDER / "model").rglob("*.json"):
        assert not json.loads(path.read_text()).get("_name_or_path"), path


def test_samples_are_deterministic_pictures() -> None:
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    first, second = (
        pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images for _ in range(2)
    )
    assert first.shape == (2, 32, 32, 1)
    assert (first == second).all()
    assert first.std() > 0.05


def test_statistics_are_moments_of_their_own_features() -> None:
    statistics = load_statistics()
    assert statistics.real_features.shape == (5000, 64)
    assert torch.linalg.eigvalsh(statistics.covariance).min() > -1e-9
    kept = Moments.of(statistics.real_features)
    distance = frechet_distance(kept.mean, kept.covariance, statistics.mean, statistics.covariance)
    # what is left is the bias of 5000 samples, small beside the spread of the data
    assert distance < 1e-3 * statistics.covariance.trace()


def test_evaluation_finds_the_features_and_their_statistics() -> None:
    extractor = load_extractor("reference")
    assert (extractor.name, extractor.num_features, extractor.channels) == ("reference", 64, 1)
    assert extractor.statistics is not None
    assert torch.equal(extractor.statistics.mean, load_statistics().mean)
    gray = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(extractor(gray), load_features()(gray))
    torch.testing.assert_close(extractor(gray.expand(-1, 3, -1, -1)), extractor(gray))


@has_data
def test_classifier_reaches_92_percent() -> None:
    images, labels = load_images("test")
    classifier = load_features().classifier
    with torch.no_grad():
        hits = [
            classifier(to_signal(x)).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    assert torch.cat(hits).double().mean() >= 0.92


@has_data
def test_floor_is_the_distance_of_the_test_images() -> None:
    statistics, extractor = load_statistics(), load_features()
    with torch.no_grad():
        features = torch.cat([extractor(batch) for batch in load_images("test")[0].split(500)])
    moments = Moments.of(features)
    distance = frechet_distance(moments.mean, moments.covariance, statistics.mean, statistics.covariance)
    assert distance == pytest.approx(statistics.floor, rel=1e-3)
