"""Full-size configurations with random weights on a small machine: time, peak memory, bytes on disk, and that the result runs.

    python benchmarks/large.py cifar10    # google/ddpm-cifar10-32, the whole tcaq recipe with few iterations
    python benchmarks/large.py sd15       # the U-Net of Stable Diffusion 1.5, preset fast; needs tcaq[transformers]

Quantizing and running are processes of their own, so that each peak is its own. Random weights say nothing of image quality;
what is measured is whether a model of this size goes through. Writes NAME.json beside the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import nn

import tcaq
from tcaq.models.denoiser import find_denoiser
from tcaq.models.prompting import resolve_conditions
from tcaq.models.sampler import sample
from tcaq.spec.conditions import Conditions

PROMPTS = ("a red fox in the snow", "a bowl of ramen")
SIZE = 256
"""Pixels of the Stable Diffusion images: latents of 32."""
ASKED = Conditions(prompts=PROMPTS, height=SIZE, width=SIZE)


def randomised(build: Callable[[], nn.Module]) -> Any:
    """A network with random weights, made without ever holding two copies of them."""
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            parameter.data.fill_(float(name.endswith("weight")))
        else:
            fan = parameter[0].numel() if parameter.dim() > 1 else 1000
            parameter.data.normal_(0, fan**-0.5, generator=generator)
    return network.eval()


def cifar10() -> tuple[DiffusionPipeline, tcaq.Recipe]:
    """The configuration of google/ddpm-cifar10-32, 35.7 million parameters."""
    unet = randomised(
        lambda: UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
            flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None, norm_eps=1e-6,
        )
    )  # fmt: skip
    few = {
        "calibration": {"images": 4, "steps": 4, "batch": 4},
        "reconstruction": {"iterations": 4, "inputs": 16, "batch": 4},
        "alignment": {"rounds": 1, "iterations": 2},
        "network": {"iterations": 4, "inputs": 16, "batch": 4},
    }
    return DDIMPipeline(unet, DDIMScheduler()), tcaq.preset_recipe("tcaq", "full", **few)


def sd15() -> tuple[DiffusionPipeline, tcaq.Recipe]:
    """The U-Net of Stable Diffusion 1.5, 860 million parameters, between a small text encoder and a small decoder."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = randomised(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8))
    torch.manual_seed(0)
    decoder = AutoencoderKL(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
    )  # fmt: skip
    tokenizer = characters()
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=decoder.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    few = {
        "calibration": {"images": 1, "steps": 2, "batch": 1, "conditions": ASKED.model_dump(mode="json")},
        "ranges": {"weight_candidates": 8, "input_candidates": 40},
        "correction": None,  # it samples three times more
    }
    return pipe, tcaq.preset_recipe("tcaq", "fast", **few)


def characters() -> Any:
    """A CLIP tokenizer to which each letter is a token."""
    import tempfile

    from transformers import CLIPTokenizer

    folder = Path(tempfile.mkdtemp())
    words = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


MODELS = {"cifar10": cifar10, "sd15": sd15}


def quantize(name: str, folder: Path) -> dict[str, Any]:
    """Build the model, quantize it, and say what it took."""
    pipe, recipe = MODELS[name]()
    parameters = sum(p.numel() for p in find_denoiser(pipe)[1].parameters())
    began = time.monotonic()
    tcaq.quantize(pipe, recipe, folder, on_progress=lambda *event: print(*event, flush=True))
    return {
        "parameters": parameters,
        "seconds": round(time.monotonic() - began, 1),
        "peak_gib": peak(),
        "recipe": recipe.model_dump(mode="json"),
    }


def run(folder: Path) -> dict[str, Any]:
    """Load the checkpoint and sample one image in two steps."""
    began = time.monotonic()
    pipe = tcaq.load(folder)
    loaded = time.monotonic()
    asked = None if isinstance(pipe, DDIMPipeline) else resolve_conditions(pipe, ASKED)
    images = sample(pipe, [1], 2, asked)
    return {
        "load_seconds": round(loaded - began, 1), "sample_seconds": round(time.monotonic() - loaded, 1), "peak_gib": peak(),
        "image": list(images.shape), "values": len(images.unique()),
    }  # fmt: skip


def peak() -> float:
    """Largest resident memory of this process so far, GiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    """Run both stages and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--output", type=Path, default=Path("build/large"))
    parser.add_argument("--stage", choices=("quantize", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.output / args.name
    if args.stage is not None:
        found = quantize(args.name, folder) if args.stage == "quantize" else run(folder)
        (args.output / f"{args.name}-{args.stage}.json").write_text(json.dumps(found))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for stage in ("quantize", "run"):
        command = [sys.executable, __file__, args.name, "--output", str(args.output), "--stage", stage]
        subprocess.run(command, check=True)
        results[stage] = json.loads((args.output / f"{args.name}-{stage}.json").read_text())
    results["unet_bytes"] = sum(p.stat().st_size for p in (folder / "unet").glob("*.safetensors"))
    (args.output / f"{args.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
