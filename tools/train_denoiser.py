"""Train the bundled reference: a small DDPM U-Net on Fashion-MNIST.

    python tools/train_denoiser.py --output build/denoiser

Interrupt it at any moment and run it again: it goes on from its last checkpoint. The result is a diffusers
`DDIMPipeline` directory with the weights' exponential moving average, and `training.json` (configuration, loss curve,
time).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Generator, Tensor
from torch.nn.functional import mse_loss
from training import Training, spread_timesteps, train

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


def main() -> None:
    """Train, then write the pipeline and the record."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    images = to_signal(load_images("train", args.data)[0])
    unet = UNet2DModel(**UNET).train()
    # clipping predictions to [-1, 1] brightens every black background: errors there can only be cut on one side
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)

    def loss_of(draw: Generator) -> Tensor:
        clean = images[torch.randint(len(images), (args.batch,), generator=draw)]
        noise = torch.randn(clean.shape, generator=draw)
        timesteps = spread_timesteps(args.batch, draw)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        return mse_loss(unet(noisy, timesteps).sample, noise)

    how = Training(args.cycles, args.rate, args.ema, args.seed, args.save_every)
    record = train(unet, loss_of, how, args.output / "training.pt")
    DDIMPipeline(unet=unet.eval(), scheduler=scheduler).save_pretrained(args.output)
    written = {
        "unet": UNET, "parameters": sum(p.numel() for p in unet.parameters()), "cycles": args.cycles,
        "batch": args.batch, "rate": args.rate, "ema": args.ema, "seed": args.seed, **record,
        "torch": torch.__version__,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
