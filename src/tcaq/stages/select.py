"""Select: give the attention probabilities of each layer and step group an even or a log2 grid (DAQ)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.models.denoiser import clock_of
from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.numerics.powerlaw import compare
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.records import Record
from tcaq.spec.grid import AdaptiveGrid, ProbabilityGrid
from tcaq.spec.recipe import Daq, RangeSearch
from tcaq.stages.operands import even_positions, nearest_group, steps_by_group


def probability_quantizers(denoiser: nn.Module) -> dict[str, ProbabilityQuantizer]:
    """Every quantizer of attention probabilities, by the name of its layer."""
    layers = quantized_layers(denoiser)
    found = {name: layer.operands.get("left") for name, layer in layers}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, ProbabilityQuantizer)}


def select(denoiser: nn.Module, ranges: Record, spec: Daq, search: RangeSearch) -> Record:
    """Record per layer `scale`, `peak` and `use_log2`, [groups], and in the meta each group's fit and both errors."""
    clock = clock_of(denoiser)
    steps = steps_by_group(clock.boundaries, ranges.tensors["timesteps"])
    positions = even_positions(steps)
    choices: dict[str, list[dict[str, Any]]] = {}
    for name, quantizer in probability_quantizers(denoiser).items():
        samples = ranges.tensors[f"{name}|left|rows"][positions].flatten(1)
        pairs = zip(steps, samples, strict=True)
        choices[name] = [{"group": group} | choose(p, quantizer.grid, spec, search) for group, p in pairs]
    nearest = nearest_group(list(steps), clock.count).tolist()
    tensors: dict[str, Tensor] = {}
    for name, rows_of in choices.items():
        every = [rows_of[i] for i in nearest]
        tensors[f"{name}|scale"] = torch.tensor([row["scale"] for row in every])
        tensors[f"{name}|peak"] = torch.tensor([row["peak"] for row in every])
        tensors[f"{name}|use_log2"] = torch.tensor([row["use_log2"] for row in every])
    return Record(tensors, {"choices": choices})


def choose(p: Tensor, grid: ProbabilityGrid, spec: Daq, search: RangeSearch) -> dict[str, Any]:
    """Fit both laws to probabilities `p` [n], search both grids' scales, and choose.

    Returns: scale, peak, use_log2, and why: alpha, ratio (R), error_even and error_log2 (mean square, relative to the mean
        square of p), both of the best scale of its grid.
    """
    fit = compare(p, spec.p_min, spec.alternative)
    last = 2**grid.bits - 1
    scale, _ = search_range(
        p[None], grid.bits, signed=False, symmetric=False, power=search.power, candidates=search.input_candidates
    )
    even = fake_quantize(p, scale, torch.zeros(1), 0, last)
    peak = p.max()
    log2 = fake_quantize_log2(p, peak, grid.bits, grid.per_octave)
    energy = p.square().mean().clamp(min=1e-30)
    error_even, error_log2 = (float((p - hat).square().mean() / energy) for hat in (even, log2))
    prefers_log2 = fit.ratio > 0 if spec.criterion == "likelihood" else error_log2 < error_even
    use_log2 = prefers_log2 if isinstance(grid, AdaptiveGrid) else grid.code == "log2"
    return {
        "scale": float(scale), "peak": float(peak), "use_log2": bool(use_log2), "alpha": min(fit.alpha, 1e9),
        "ratio": fit.ratio, "count": fit.count, "error_even": error_even, "error_log2": error_log2,
    }  # fmt: skip


def apply_choices(denoiser: nn.Module, record: Record) -> None:
    """Write every probability quantizer's tables."""
    for name, quantizer in probability_quantizers(denoiser).items():
        quantizer.set_rows(*(record.tensors[f"{name}|{field}"] for field in ("scale", "peak", "use_log2")))
