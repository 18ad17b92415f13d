"""Train the classifier behind the bundled feature extractor on Fashion-MNIST.

    python tools/train_classifier.py --output build/classifier

Interrupt it at any moment and run it again: it goes on after its last whole epoch and ends with the weights of the
undisturbed run. The result is `classifier.safetensors` and `classifier.json` (configuration, curve, test accuracy).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from tcaq.reference.classifier import GarmentClassifier
from tcaq.reference.data import DEBIAN_FOLDER, load_images, to_signal


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def augment(x: Tensor, draw: torch.Generator, shift: int = 1) -> Tensor:
    """Mirror each image [N, 1, 32, 32] with probability one half; shift the batch by at most `shift` pixels."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    row, column = torch.randint(2 * shift + 1, (2,), generator=draw).tolist()
    return pad(x, (shift, shift, shift, shift), value=-1.0)[..., row : row + 32, column : column + 32]


def disturb(x: Tensor, draw: torch.Generator, brightness: float = 0.1, noise: float = 0.06) -> Tensor:
    """Offset and noise that an eye hardly sees, of a strength of its own for each image [N, 1, 32, 32].

    Without them the features make more of a background one gray level off than of a wrong garment.
    Args: brightness: largest offset; noise: largest standard deviation; both where black is -1 and white is 1.
    """
    offset = (torch.rand(len(x), 1, 1, 1, generator=draw) * 2 - 1) * brightness
    strength = torch.rand(len(x), 1, 1, 1, generator=draw) * noise
    return (x + offset + strength * torch.randn(x.shape, generator=draw)).clamp(-1.0, 1.0)


def rate_at(iteration: int, total: int, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to zero, as a factor of the peak rate."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / max(1, total - warmup)))


@torch.no_grad()
def accuracy(model: GarmentClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images [N, 1, 32, 32] whose highest logit is their label."""
    model.eval()
    hits = [model(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return torch.cat(hits).double().mean().item()


def save(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename, so that an interrupted save leaves the old checkpoint whole."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def train(args: argparse.Namespace, model: GarmentClassifier) -> tuple[list[tuple[int, float, float]], float]:
    """Train in place. Returns: (epoch, mean loss, test accuracy) a row, and seconds spent."""
    images, labels = load_images("train", args.data)
    test_images, test_labels = load_images("test", args.data)
    signal, test_signal = to_signal(images), to_signal(test_images)
    batches = len(signal) // args.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i, args.epochs * batches))
    start, curve, seconds, checkpoint = 0, [], 0.0, args.output / "training.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, curve, seconds = state["epoch"], state["curve"], state["seconds"]
    with Progress() as progress:
        bar = progress.add_task("training", total=args.epochs * batches, completed=start * batches)
        for epoch in range(start, args.epochs):
            began, total = time.monotonic(), 0.0
            # one generator an epoch: a resumed run draws what the undisturbed one would have drawn
            draw = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            model.train()
            for index in torch.randperm(len(signal), generator=draw)[: batches * args.batch].split(args.batch):
                x = disturb(augment(signal[index], draw), draw)
                loss = cross_entropy(model(x), labels[index], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
                progress.advance(bar)
            seconds += time.monotonic() - began
            curve.append((epoch + 1, total / batches, accuracy(model, test_signal, test_labels)))
            progress.console.print(
                f"epoch {epoch + 1}: loss {total / batches:.4f}, test {curve[-1][2]:.4f}, {seconds:.0f} s"
            )
            save(checkpoint, {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                "epoch": epoch + 1, "curve": curve, "seconds": seconds,
            })  # fmt: skip
    return curve, seconds


def main() -> None:
    """Train, then write the weights and the record."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = GarmentClassifier()
    curve, seconds = train(args, model)
    save_file(model.eval().state_dict(), args.output / "classifier.safetensors")
    record = {
        "parameters": sum(p.numel() for p in model.parameters()), "epochs": args.epochs, "batch": args.batch,
        "rate": args.rate, "seed": args.seed, "accuracy": curve[-1][2], "seconds": seconds, "curve": curve,
        "torch": torch.__version__,
    }  # fmt: skip
    (args.output / "classifier.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
