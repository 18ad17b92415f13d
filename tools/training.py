"""A training loop that can be stopped at any moment: the rate's course, one generator for each iteration, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from rich.progress import Progress
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes: cycles: iterations of each cycle of the learning rate; rate: its peak; ema: decay of the weights' exponential moving
        average; seed: of everything drawn; save_every: iterations between checkpoints.
    """

    cycles: list[int]
    rate: float
    ema: float = 0.999
    seed: int = 0
    save_every: int = 250


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


def spread_timesteps(batch: int, draw: Generator) -> Tensor:
    """One timestep of 1000 from each of `batch` equal parts: a batch that sees all noise levels steadies the gradient."""
    parts = torch.arange(batch) + torch.rand(batch, generator=draw)
    return (parts * (1000 / batch)).long().clamp(max=999)


def train(
    model: nn.Module, loss_of: Callable[[Generator], Tensor], how: Training, checkpoint: Path
) -> dict[str, Any]:  # fmt: skip
    """Train a model, which holds the moving average of its weights afterwards.

    Args: loss_of: the loss of one batch, drawn by the generator it is given; checkpoint: written as training goes on, and gone on
        from if it is there.
    Returns: curve, pairs of an iteration and the mean loss since the one before, and seconds.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rate_at(i, how.cycles))
    ema = EMAModel(model.parameters(), decay=how.ema, use_ema_warmup=True, power=0.75)
    total, start, curve, seconds = sum(how.cycles), 0, [], 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        for group in optimizer.param_groups:  # a list of cycles that grew since has another rate here
            group["lr"] = how.rate * rate_at(state["iteration"], how.cycles)
        start, curve, seconds = state["iteration"], state["curve"], state["seconds"]
    with Progress() as progress:
        bar = progress.add_task("training", total=total, completed=start)
        mean, began = 0.0, time.monotonic()
        for iteration in range(start, total):
            # one generator an iteration: a resumed run draws the batches the undisturbed one would have drawn
            loss = loss_of(torch.Generator().manual_seed(how.seed * 1_000_003 + iteration))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            ema.step(model.parameters())
            mean += loss.item()
            progress.update(bar, completed=iteration + 1, description=f"loss {loss.item():.4f}")
            done = iteration + 1
            if done % how.save_every == 0 or done == total:
                steps = done - start if not curve else done - curve[-1][0]
                curve.append((done, mean / max(1, steps)))
                seconds += time.monotonic() - began
                mean, began = 0.0, time.monotonic()
                progress.console.print(f"iteration {done}: mean loss {curve[-1][1]:.5f}, {seconds:.0f} s")
                save(checkpoint, {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
                    "ema": ema.state_dict(), "iteration": done, "curve": curve, "seconds": seconds,
                })  # fmt: skip
    ema.copy_to(model.parameters())
    return {"curve": curve, "seconds": seconds}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename, so that an interrupted save leaves the old checkpoint whole."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)
