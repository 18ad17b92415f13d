"""Train the second model of the studies: a class-conditional latent DiT on Fashion-MNIST.

    python tools/train_dit.py --output build/dit

First a small autoencoder (32x32 pixels to 4x16x16 latents), then a diffusion transformer on its latents that also learns to do
without a label, for guidance. Interrupt it at any moment and run it again: it goes on from its last checkpoint. The result is a
diffusers `DiTPipeline` directory, with `training.json` (configuration, loss curves, time) beside its parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Generator, Tensor
from torch.nn.functional import mse_loss
from training import Training, spread_timesteps, train

from tcaq.models.class_names import keep_class_names
from tcaq.reference.data import CLASSES, DEBIAN_FOLDER, load_images, to_signal

AUTOENCODER: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
DIT: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 40,
    "num_embeds_ada_norm": 1000,  # the pipeline takes 1000 for the label of nothing
}
NO_LABEL = 1000
DROPPED = 0.1
"""Share of labels left out in training."""
KL_WEIGHT = 1e-4


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, help="folder with the four IDX files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--autoencoder-iterations", type=int, default=1500)
    parser.add_argument("--iterations", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_autoencoder(images: Tensor, args: argparse.Namespace) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The autoencoder, its latents scaled to a standard deviation of one."""
    vae = AutoencoderKL(**AUTOENCODER)

    def loss_of(draw: Generator) -> Tensor:
        clean = images[torch.randint(len(images), (32,), generator=draw)]
        latents = vae.encode(clean).latent_dist
        return (
            mse_loss(vae.decode(latents.sample(draw)).sample, clean)
            + KL_WEIGHT * latents.kl().mean() / clean[0].numel()
        )

    how = Training([args.autoencoder_iterations], rate=2e-3, ema=0.99, seed=args.seed)
    record = train(vae, loss_of, how, args.output / "autoencoder.pt")
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / encode(vae, images[:2000]).std().item())
    return vae, record


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Means of the latents, [N, 4, 16, 16], as the autoencoder gives them."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(500)])


def train_dit(
    latents: Tensor, labels: Tensor, scheduler: DDIMScheduler, args: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The transformer. It stays in evaluation mode: diffusers' own dropping of labels draws anew in every block."""
    dit = DiTTransformer2DModel(**DIT).eval()

    def loss_of(draw: Generator) -> Tensor:
        which = torch.randint(len(latents), (args.batch,), generator=draw)
        noise = torch.randn((args.batch, *latents.shape[1:]), generator=draw)
        dropped = torch.rand(args.batch, generator=draw) < DROPPED
        timesteps = spread_timesteps(args.batch, draw)
        noisy = scheduler.add_noise(latents[which], noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = dit(noisy, timesteps, class_labels=labels[which].masked_fill(dropped, NO_LABEL)).sample
        return mse_loss(predicted.float(), noise)

    return dit, train(dit, loss_of, Training([args.iterations], rate=1e-3, seed=args.seed), args.output / "dit.pt")


def clear_unused(dit: DiTTransformer2DModel) -> None:
    """Zero the embeddings of labels that are not of this data: they hold noise, and noise does not compress."""
    for name, parameter in dit.named_parameters():
        if name.endswith("embedding_table.weight"):
            parameter.data[len(CLASSES) : NO_LABEL] = 0


def main() -> None:
    """Train both, then write the pipeline and the record."""
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pixels, labels = load_images("train", args.data)
    images = to_signal(pixels)
    vae, first = train_autoencoder(images, args)
    latents = encode(vae, images) * vae.config.scaling_factor
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    dit, second = train_dit(latents, labels, scheduler, args)
    clear_unused(dit)
    for part in (dit, vae):
        part.half().float()  # what half precision holds takes half the room where the files are compressed
    pipe = DiTPipeline(transformer=dit, vae=vae, scheduler=scheduler, id2label=dict(enumerate(CLASSES)))
    keep_class_names(pipe)
    pipe.save_pretrained(args.output)
    record = {
        "autoencoder": AUTOENCODER | first, "dit": DIT | second, "batch": args.batch, "seed": args.seed,
        "parameters": sum(p.numel() for p in dit.parameters()), "torch": torch.__version__,
    }  # fmt: skip
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
