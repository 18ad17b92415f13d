"""A run made by hand, every number of which is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tcaq.records import Record, write_json
from tcaq.report import Entry, Trial
from tcaq.runs import Run
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, Log2Grid
from tcaq.spec.plan import LayerGrids, ResolvedPlan
from tcaq.spec.recipe import Recipe

CONV, LINEAR, MIX, FIXED = "down.<b>0</b>&conv$1$", "mid.linear", "mid.attn.mix", "up.attn.mix"
SAMPLER = "DDIM <40>"
TIMESTEPS = [900, 500, 100]
R = [1.0, 2.0, 4.0, 1.0]
LOW = [[-1.0, -2.0, 0.0, -0.5], [-1.0, -2.0, 0.0, -0.5], [-1.0, -2.0, 0.0, -0.5]]
HIGH = [[0.5, 4.0, 8.0, 3.0], [0.5, 4.0, 16.0, 3.0], [0.5, 1.0, 8.0, 3.0]]
WIDTHS = {"widths": [4, 8], "snr": "norms"}
LAYER_WIDTHS = {"layers": [CONV], "widths": [2, 3, 6]}
SENSITIVITY = [0.71, 0.19, 0.0023]
FORWARD, NARROW, WIDE = [0.01, 1.25, 99.0], [2.5, 1.0, 0.75], [30.0, 20.0, 10.0]
STEP_BITS = [8, 8, 4]  # group 0 holds the last step of sampling
LOSSES = {0: {"down<i>": (0.5, 0.125), "mid": (0.25, 0.0625)}, 1: {"down<i>": (0.375, 0.1), "mid": (0.2, 0.05)}}
FD = [31.25, 33.5]
SLOPE, BIAS = [-0.25, -0.125, 0.0625], [[0.6], [-0.3], [0.1]]  # group 0 holds the last step of sampling
TRIALS = {"strengths": [0.0, 0.5, 1.0], "errors": [49.0, 20.25, 25.0], "kept": 0.5}
TIMINGS = {
    "collect/0/000-batch-0": {"seconds": 10.5, "peak_memory": 500_000_000},
    "observe": {"seconds": 4.25, "peak_memory": 600_000_000},
    "reconstruct/0/000-down-i": {"seconds": 30.0, "peak_memory": 700_000_000},
    "reconstruct/0/001-mid": {"seconds": 40.0, "peak_memory": 800_000_000},
}


def plan() -> ResolvedPlan:
    weight, inputs = AffineGrid(bits=4, signed=True, symmetric=True), AffineGrid(bits=8)
    return ResolvedPlan(
        layers=(
            LayerGrids(name=CONV, kind="conv", weight=weight, inputs=(inputs,)),
            LayerGrids(name=LINEAR, kind="linear", reason="kept <float> & whole"),
            LayerGrids(name=MIX, kind="mix", inputs=(AdaptiveGrid(bits=8), inputs)),
            LayerGrids(name=FIXED, kind="mix", inputs=(Log2Grid(bits=8), inputs)),
        )
    )


def choice(group: int, ratio: float, even: float, log2: float) -> dict[str, Any]:
    return {
        "group": group, "scale": 0.1, "peak": 1.0, "use_log2": ratio > 0, "alpha": 1.5, "ratio": ratio, "count": 100,
        "error_even": even, "error_log2": log2,
    }  # fmt: skip


CHOICES = {
    MIX: [choice(0, -2.5, 0.01, 0.04), choice(1, 3.75, 0.08, 0.02), choice(2, 1.25, 0.03, 0.06)],
    FIXED: [choice(g, 777.0, 0.1, 0.1) for g in range(3)],
}


def write_run(folder: Path, *, whole: bool, seed: int = 5, traded: bool = False) -> None:
    """A checkpoint folder with a run of every stage, or (not whole) of those that min-max has.

    traded: one of whose layers chose the widths of its weight and of its input.
    """
    recipe = Recipe(weights=4, activations=8, seed=seed).model_dump(mode="json")
    identity = {
        "recipe": recipe, "plan": plan().model_dump(mode="json"), "weights": "c0ffee", "versions": {"torch": "2.99.0"}
    }  # fmt: skip
    observed = {f"{CONV}|input|low": torch.tensor(LOW), f"{CONV}|input|high": torch.tensor(HIGH)}
    with Run.open(folder / "run", identity) as run:
        if traded:
            tables = {
                "bits": torch.tensor([6]),
                "sizes": torch.tensor([432]),
                "sensitivity": torch.tensor([SENSITIVITY]).double(),
            }
            run.step("allocate", lambda: Record(tables, LAYER_WIDTHS), lambda r: r)
            run.step("allocate-inputs", lambda: Record(tables | {"bits": torch.tensor([3])}, LAYER_WIDTHS), lambda r: r)
        run.step("observe", lambda: Record(observed | {"timesteps": torch.tensor(TIMESTEPS)}), lambda r: r)
        if whole:
            ratios = torch.tensor([NARROW, WIDE]).double()
            tables = {
                "timesteps": torch.tensor(TIMESTEPS),
                "forward": torch.tensor(FORWARD, dtype=torch.float64),
                "quantized": ratios,
            }
            run.step("widths", lambda: Record(tables | {"bits": torch.tensor(STEP_BITS)}, WIDTHS), lambda r: r)
            run.step("equalize", lambda: Record({CONV: torch.tensor(R)}), lambda r: r)
            run.step("select", lambda: Record({}, {"choices": CHOICES}), lambda r: r)
            for number, losses in LOSSES.items():
                run.series(
                    f"reconstruct/{number}", list(losses),
                    lambda unit, of=losses: Record({}, {"unit": unit, "loss_before": of[unit][0], "loss_after": of[unit][1]}),
                    lambda unit, record: None,
                )  # fmt: skip
                run.step(f"score/{number}", lambda n=number: Record({}, {"fd": FD[n]}), lambda r: r)
            run.step("correct", lambda: Record({"slope": torch.tensor(SLOPE), "bias": torch.tensor(BIAS)}), lambda r: r)
            run.step("temper", lambda: Record({}, TRIALS), lambda r: r)
    write_json(folder / "run" / "timings.json", TIMINGS)


def evaluation(fd: float | None = 42.625, num: int = 2000) -> dict[str, Any]:
    """What `tcaq evaluate` writes, with numbers that occur nowhere else."""
    return {
        "float": {"fd": None if fd is None else 20.5, "kid": 0.0123, "seconds": 71.0, "peak_memory": 912_000_000},
        "quantized": {"fd": fd, "kid": 0.0456, "seconds": 300.0, "peak_memory": 1_250_000_000},
        "paired": {
            "psnr": 18.375, "ssim": 0.8125, "fd_to_float": 9.75,
            "sqnr_per_step": [{"timestep": t, "sqnr": s} for t, s in zip(TIMESTEPS, (21.5, 12.25, 17.0), strict=True)],
        },
        "ratio": {"fd": None if fd is None else fd / 20.5},
        "num": num, "steps": 40, "scheduler": "DDIMScheduler", "seed": 11, "features": "reference",
        "versions": {"torchmetrics": "1.99"},
    }  # fmt: skip


def images(count: int = 5, channels: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, 6, 7), generator=generator, dtype=torch.uint8)


@pytest.fixture
def whole(tmp_path: Path) -> Callable[..., Entry]:
    """Makes an entry with every stage."""

    def make(name: str = "tcaq <4>", **options: Any) -> Entry:
        write_run(tmp_path / "whole", whole=True)
        return Entry(name, tmp_path / "whole", [Trial(SAMPLER, evaluation(**options), images(seed=1), images())])

    return make


@pytest.fixture
def traded(tmp_path: Path) -> Callable[..., Entry]:
    """Makes an entry whose layers chose their widths."""

    def make(name: str = "by layer") -> Entry:
        write_run(tmp_path / "traded", whole=False, traded=True)
        return Entry(name, tmp_path / "traded", [Trial(SAMPLER, None, images(seed=3), images())])

    return make


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Entry]:
    """Makes an entry without optional stages and without an evaluation."""

    def make(name: str = "min-max") -> Entry:
        write_run(tmp_path / "bare", whole=False)
        return Entry(name, tmp_path / "bare", [Trial(SAMPLER, None, images(seed=2), images())])

    return make
