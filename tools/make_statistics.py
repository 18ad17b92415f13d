"""Features of the real data, and the floor that no model can be expected to beat.

    python tools/make_statistics.py --classifier build/classifier/classifier.safetensors --output build/statistics

Writes `statistics.npz` (mean and covariance over the training images, features of a random subset of them, the floor)
and `statistics.json` (counts, seed, Fréchet and kernel distance between the test and the training images).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from tcaq.evaluate.metrics import Moments, frechet_distance, kernel_distance
from tcaq.reference.data import DEBIAN_FOLDER, load_images
from tcaq.reference.features import GarmentFeatures
from tcaq.reference.load import load_classifier


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kept", type=int, default=5000, help="training images whose features are kept")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    return parser.parse_args()


@torch.no_grad()
def features_of(split: str, data: Path, extractor: GarmentFeatures) -> Tensor:
    """Features, float32 [N, 64], of all images of one split."""
    images, _ = load_images(split, data)
    return torch.cat([extractor(batch) for batch in track(images.split(500), description=f"{split} images")])


def main() -> None:
    """Measure, then write both files."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    extractor = GarmentFeatures(load_classifier(args.classifier))
    train, test = features_of("train", args.data, extractor), features_of("test", args.data, extractor)
    of_train, of_test = Moments.of(train), Moments.of(test)
    floor = frechet_distance(of_test.mean, of_test.covariance, of_train.mean, of_train.covariance)
    kept = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))[: args.kept]]
    np.savez_compressed(
        args.output / "statistics.npz",
        mean=of_train.mean.numpy(),
        covariance=of_train.covariance.numpy(),
        real_features=kept.numpy(),
        floor=np.float64(floor),
    )
    record = {
        "train": len(train), "test": len(test), "kept": len(kept), "seed": args.seed, "features": train.shape[1],
        "floor_fd": floor, "floor_kid": kernel_distance(kept, test), "torch": torch.__version__,
    }  # fmt: skip
    (args.output / "statistics.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
