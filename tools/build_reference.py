"""Assemble the bundled reference from what the three other tools made, measure the float model, write the card.

    python tools/build_reference.py --denoiser build/denoiser --classifier build/classifier \\
        --statistics build/statistics --num 2000

The float samples that are measured are cached by batch, under the hash of weights and scheduler: interrupted, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline
from rich.progress import Progress
from torch import Tensor

from tcaq.evaluate.metrics import Moments, frechet_distance, kernel_distance
from tcaq.reference.data import DEBIAN_FOLDER, load_images
from tcaq.reference.features import GarmentFeatures, ReferenceStatistics
from tcaq.reference.load import FOLDER, load_classifier, load_statistics

LIMIT = 15_000_000
"""Bytes that all bundled files may take together."""


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--denoiser", type=Path, required=True, help="output of train_denoiser.py")
    parser.add_argument("--classifier", type=Path, required=True, help="output of train_classifier.py")
    parser.add_argument("--statistics", type=Path, required=True, help="output of make_statistics.py")
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="where the package looks for it")
    parser.add_argument("--cache", type=Path, default=Path("build/samples"), help="where float samples are kept")
    parser.add_argument("--num", type=int, default=2000, help="float samples to measure, at least 2")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.num < 2:
        parser.error(f"--num {args.num}: a distance needs at least 2 samples")
    return args


def sample(pipeline: DDIMPipeline, seeds: range, steps: int) -> Tensor:
    """Images, uint8 [N, 1, H, W], each from a generator of its own, so that batches do not matter."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(len(seeds), generator=generators, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def float_samples(args: argparse.Namespace) -> tuple[Tensor, float]:
    """`args.num` samples of the denoiser, from the cache where they are there, and the seconds they took."""
    pipeline = DDIMPipeline.from_pretrained(args.denoiser, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    weights = args.denoiser / "unet" / "diffusion_pytorch_model.safetensors"
    scheduler = args.denoiser / "scheduler" / "scheduler_config.json"
    digest = hashlib.sha256(weights.read_bytes() + scheduler.read_bytes()).hexdigest()[:16]
    folder = args.cache / f"{digest}-steps{args.steps}-seed{args.seed}-batch{args.batch}"
    folder.mkdir(parents=True, exist_ok=True)
    parts, seconds = [], 0.0
    with Progress() as progress:
        for start in progress.track(range(0, args.num, args.batch), description=f"{args.num} float samples"):
            path = folder / f"{start:06d}-{min(args.num, start + args.batch):06d}.npz"
            if not path.exists():
                began = time.monotonic()
                first = args.seed * 1_000_003 + start
                images = sample(pipeline, range(first, first + min(args.batch, args.num - start)), args.steps)
                beside = path.with_suffix(".new.npz")
                np.savez_compressed(beside, images=images.numpy(), seconds=time.monotonic() - began)
                beside.replace(path)
            with np.load(path) as file:
                parts.append(torch.from_numpy(file["images"]))
                seconds += float(file["seconds"])
    return torch.cat(parts), seconds


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Distances to the training data: of the float samples, and of as many test images."""
    images, seconds = float_samples(args)
    extractor = GarmentFeatures(load_classifier(args.classifier / "classifier.safetensors"))
    real = load_statistics(args.statistics / "statistics.npz")
    features = features_of(images, extractor)
    test = features_of(load_images("test", args.data)[0][: args.num], extractor)
    return {
        "num": args.num, "steps": args.steps, "seed": args.seed, "seconds": seconds, "torch": torch.__version__,
        "fd": distance_to(real, features), "kid": kernel_distance(real.real_features, features),
        "test_num": len(test), "test_fd": distance_to(real, test),
    }  # fmt: skip


@torch.no_grad()
def features_of(images: Tensor, extractor: GarmentFeatures) -> Tensor:
    """Features, float32 [N, 64], of uint8 images [N, 1, 32, 32]."""
    return torch.cat([extractor(batch) for batch in images.split(500)])


def distance_to(real: ReferenceStatistics, features: Tensor) -> float:
    """Fréchet distance of features [N, 64] to the training data."""
    moments = Moments.of(features)
    return frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)


def thin(curve: list[list[float]], rows: int = 12) -> list[list[float]]:
    """At most about `rows` rows of a curve, evenly spread, the last among them."""
    stride = -(-len(curve) // rows)
    return curve[::-1][::stride][::-1]


def card(records: dict[str, dict[str, Any]]) -> str:
    """The model card, from the records "denoiser", "classifier", "statistics" and "floats"."""
    denoiser, classifier = records["denoiser"], records["classifier"]
    template = Path(__file__).with_name("reference_card.md").read_text()
    return template.format(
        **records,
        channels=", ".join(map(str, denoiser["unet"]["block_out_channels"])),
        accuracy=100 * classifier["accuracy"],
        cycles=" + ".join(map(str, denoiser["cycles"])),
        denoiser_minutes=denoiser["seconds"] / 60,
        classifier_minutes=classifier["seconds"] / 60,
        loss_rows="\n".join(f"| {int(i)} | {loss:.5f} |" for i, loss in thin(denoiser["curve"])),
        epoch_rows="\n".join(f"| {int(i)} | {loss:.4f} | {100 * hit:.2f} % |" for i, loss, hit in classifier["curve"]),
    )


def read_record(path: Path) -> dict[str, Any]:
    """One tool's JSON record; ends the program with the remedy where it is missing."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: let the tool that writes it finish first (docs/reference-model.md)")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def bundled_size(folder: Path) -> int:
    """Bytes of the files that make up the reference in a folder."""
    files = [
        *(folder / "model").rglob("*"),
        *(folder / n for n in ("classifier.safetensors", "statistics.npz", "CARD.md")),
    ]
    return sum(p.stat().st_size for p in files if p.is_file())


def main() -> None:
    """Measure, assemble, check the size."""
    args = arguments()
    records = {
        "denoiser": read_record(args.denoiser / "training.json"),
        "classifier": read_record(args.classifier / "classifier.json"),
        "statistics": read_record(args.statistics / "statistics.json"),
    }
    records["floats"] = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    pipeline = DDIMPipeline.from_pretrained(args.denoiser, local_files_only=True)
    shutil.rmtree(args.output / "model", ignore_errors=True)
    pipeline.unet.register_to_config(_name_or_path="")  # where it lay on this machine is nobody's business,
    pipeline = DDIMPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)  # so start an index without it, too
    pipeline.save_pretrained(args.output / "model")
    for path in (args.output / "model").rglob("*.safetensors"):
        path.chmod(0o644)
    shutil.copyfile(args.classifier / "classifier.safetensors", args.output / "classifier.safetensors")
    shutil.copyfile(args.statistics / "statistics.npz", args.output / "statistics.npz")
    (args.output / "CARD.md").write_text(card(records))
    size = bundled_size(args.output)
    distance, floor = records["floats"]["fd"], records["statistics"]["floor_fd"]
    print(f"{args.output}: {size / 1e6:.1f} MB; Fréchet distance {distance:.4f}, floor {floor:.4f}")
    if size > LIMIT:
        raise SystemExit(f"the bundled files take {size} bytes, at most {LIMIT} are allowed")


if __name__ == "__main__":
    main()
