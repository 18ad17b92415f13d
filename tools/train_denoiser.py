"""Train the bundled reference: a small DDPM U-Net on Fashion-MNIST.

    python tools/train_denoiser.py --output build/denoiser

Interrupt it at any moment and run it again: it goes on from its last checkpoint. The result is a diffusers
`DDIMPipeline` directory with the weights' exponential moving average, and `training.json` (configuration, loss curve,
time).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from rich.progress import Progress
from torch.nn.functional import mse_loss

from tcaq.reference.data import DEBIAN_FOLDER, load_images, to_signal

UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 48, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 48,
}


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--cycles",
        type=int,
        nargs="+",
        default=[5000, 6000],
        help="iterations of each cycle of the learning rate; a longer list goes on from a finished shorter one",
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250, help="iterations between checkpoints")
    return parser.parse_args()


def rate_at(iteration: int, cycles: list[int], warmup: int = 200, cooldown: float = 0.35) -> float:
    """The learning rate as a factor of its peak, in cycles with warm restarts (Loshchilov and Hutter 2017).

    A cycle: linear warm-up, then a slow cosine that would take half as long again as the cycle, and over the last part a
    linear way down to zero: most of the training at a high rate, and still a settled end.
    """
    total, *later = cycles
    if later and iteration >= total:
        return rate_at(iteration - total, later, warmup, cooldown)
    if iteration < warmup:
        return (iteration + 1) / warmup
    slow = 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (1.5 * total - warmup)))
    return slow * min(1.0, (total - iteration) / (cooldown * total))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename, so that an interrupted save leaves the old checkpoint whole."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def main() -> None:
    """Train, then write the pipeline and the record."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images = to_signal(load_images("train", args.data)[0])
    unet = UNet2DModel(**UNET).train()
    # clipping predictions to [-1, 1] brightens every black background: errors there can only be cut on one side
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i, args.cycles))
    ema = EMAModel(unet.parameters(), decay=args.ema, use_ema_warmup=True, power=0.75)
    total, start, curve, seconds = sum(args.cycles), 0, [], 0.0
    checkpoint = args.output / "training.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        for group in optimizer.param_groups:  # a list of cycles that grew since has another rate here
            group["lr"] = args.rate * rate_at(state["iteration"], args.cycles)
        start, curve, seconds = state["iteration"], state["curve"], state["seconds"]
    with Progress() as progress:
        bar = progress.add_task("training", total=total, completed=start)
        mean, began = 0.0, time.monotonic()
        for iteration in range(start, total):
            # one generator an iteration: a resumed run draws the batches the undisturbed one would have drawn
            draw = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
            clean = images[torch.randint(len(images), (args.batch,), generator=draw)]
            noise = torch.randn(clean.shape, generator=draw)
            # one timestep from each of `batch` equal parts: a batch that sees all noise levels steadies the gradient
            parts = torch.arange(args.batch) + torch.rand(args.batch, generator=draw)
            timesteps = (parts * (1000 / args.batch)).long().clamp(max=999)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            loss = mse_loss(unet(noisy, timesteps).sample, noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.step(unet.parameters())
            mean += loss.item()
            progress.update(bar, completed=iteration + 1, description=f"loss {loss.item():.4f}")
            done = iteration + 1
            if done % args.save_every == 0 or done == total:
                steps = done - start if not curve else done - curve[-1][0]
                curve.append((done, mean / max(1, steps)))
                seconds += time.monotonic() - began
                mean, began = 0.0, time.monotonic()
                progress.console.print(f"iteration {done}: mean loss {curve[-1][1]:.5f}, {seconds:.0f} s")
                save(checkpoint, {
                    "unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    "ema": ema.state_dict(), "iteration": done, "curve": curve, "seconds": seconds,
                })  # fmt: skip
    ema.copy_to(unet.parameters())
    DDIMPipeline(unet=unet.eval(), scheduler=scheduler).save_pretrained(args.output)
    record = {
        "unet": UNET, "parameters": sum(p.numel() for p in unet.parameters()), "cycles": args.cycles,
        "batch": args.batch, "rate": args.rate, "ema": args.ema, "seed": args.seed, "seconds": seconds,
        "curve": curve, "torch": torch.__version__,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
