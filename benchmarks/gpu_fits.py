"""What recording the steps of fits as CUDA graphs saves: milliseconds an iteration, replayed and launched one by one.

    python benchmarks/gpu_fits.py             a minute on an H100

Three units of the bundled model at W4A4 and the whole of it, from min-max grids; batches of 32 (16 for the whole) out of 160
inputs. Each learns for 300 iterations replayed, 100 launched; those before the 30th, in which graphs are recorded, do not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from on_gpu import device_name
from page import ROOT
from torch import nn

from tcaq.cli.models import open_float, placed
from tcaq.layers.insert import insert
from tcaq.models.denoiser import attach_clock, clock_of, find_denoiser
from tcaq.models.sampler import record
from tcaq.models.seeds import image_seeds
from tcaq.models.trajectories import Trajectories
from tcaq.models.units import Unit, default_plan, execution_order, resolve
from tcaq.records import Record, write_json
from tcaq.spec.recipe import NetworkFit, RangeSearch, Reconstruction
from tcaq.spec.steps import StepGroups
from tcaq.stages import learn
from tcaq.stages.graphs import RecordedStep
from tcaq.stages.observe import observe
from tcaq.stages.reconstruct import Reconstructor, apply_unit, unit_state
from tcaq.stages.scale import apply_input_scales, apply_weight_scales, scale_inputs, scale_weights

RESULTS = ROOT / "benchmarks" / "results" / "gpu-fits.json"
UNITS = ("down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.upsamplers.0.conv", "network")
SKIPPED = 30


def prepared(device: str) -> tuple[nn.Module, Trajectories]:
    """The bundled model with quantized layers on min-max grids, and a few trajectories."""
    pipe = placed(open_float("reference"), device)
    _, trajectories = record(pipe, image_seeds("calibration", 0, 0, 16), 10)
    unet, search = find_denoiser(pipe)[1], RangeSearch(values=2000, weight_candidates=1, input_candidates=1)
    groups = StepGroups.of("per-step", trajectories.timesteps.tolist())
    insert(unet, resolve(unet, default_plan(unet, 4, 4)), attach_clock(unet, groups))
    ranges = observe(unet, trajectories, search.values, 16, 0)
    apply_weight_scales(unet, scale_weights(unet, ranges, search))
    apply_input_scales(unet, scale_inputs(unet, ranges, search))
    return unet, trajectories


class Timed:
    """Does steps and notes when the first that counts began."""

    def __init__(self, do: Callable[..., None]) -> None:
        self.do, self.count, self.began = do, 0, 0.0

    def __call__(self, form: Any, *values: Any) -> None:
        if self.count == SKIPPED:
            torch.cuda.synchronize()
            self.began = time.perf_counter()
        self.count += 1
        self.do(form, *values)

    def milliseconds(self) -> float:
        """Of a step that counts."""
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - self.began) / (self.count - SKIPPED)


def launched(step: Callable[..., None], recorder: object, device: torch.device) -> Callable[..., None]:
    """A step that is never recorded."""
    return lambda form, rows, beta: step(*form, rows, torch.as_tensor(beta, device=device))


def timed(unet: nn.Module, trajectories: Trajectories, name: str, kind: Callable[..., Any], count: int) -> float:
    """Milliseconds of a step while a unit learns, which is undone afterwards."""
    first = next(trajectories.calls())[:1]
    with torch.no_grad():
        units = execution_order(unet, lambda: first(unet))
    if name == "network":
        units, spec = [Unit("network", unet)], NetworkFit(inputs=160).reconstruction()
    else:
        spec = Reconstruction(inputs=160)
    unit, clocks = next(unit for unit in units if unit.name == name), list[Timed]()
    learn.RecordedStep = lambda *how: clocks.append(Timed(kind(*how))) or clocks[-1]
    before = {key: value.clone() for key, value in unit_state(unit).items()}
    with Reconstructor(unet, units, trajectories, learn.Fit(spec, count), memory=8.0) as reconstructor:
        learn.learn(
            learn.Objective(unit, lessons := reconstructor._lessons(unit), clock_of(unet), ones(lessons)),
            reconstructor.how, torch.Generator().manual_seed(0), rounding=name != "network", scales=True,
        )  # fmt: skip
    spent = clocks[0].milliseconds()
    apply_unit(unit, Record(before))
    return round(spent, 3)


def ones(lessons: Any) -> tuple[torch.Tensor, ...]:
    """Losses as they are."""
    return tuple(torch.ones(len(part), 1, device=part.timesteps.device) for part in lessons.parts)


def main() -> None:
    """All units, both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    unet, trajectories = prepared(args.device)
    results: dict[str, Any] = {"device": device_name(args.device), "torch": torch.__version__, "milliseconds": {}}
    for name in UNITS:
        ways = {"replayed": (RecordedStep, 300), "launched": (launched, 100)}
        results["milliseconds"][name] = {way: timed(unet, trajectories, name, *how) for way, how in ways.items()}
        print(name, results["milliseconds"][name], flush=True)
        write_json(args.results, results)


if __name__ == "__main__":
    main()
