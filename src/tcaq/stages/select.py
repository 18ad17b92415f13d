"""Select: give the attention probabilities of each layer and step group an even or a log2 grid (DAQ)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.numerics.affine import fake_quantize
from tcaq.numerics.log2 import fake_quantize_log2
from tcaq.numerics.powerlaw import compare
from tcaq.numerics.ranges import search_range
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.records import Record
from tcaq.spec.grid import AdaptiveGrid, ProbabilityGrid
from tcaq.spec.recipe import Daq, RangeSearch
from tcaq.stages.rows import Classes, own_rows
from tcaq.stages.scale import grouped_values, operand_rows


def probability_quantizers(denoiser: nn.Module) -> dict[str, ProbabilityQuantizer]:
    """Every quantizer of attention probabilities, by the name of its layer."""
    layers = quantized_layers(denoiser)
    found = {name: layer.operands.get("left") for name, layer in layers}
    return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, ProbabilityQuantizer)}


def select(
    denoiser: nn.Module, ranges: Record, spec: Daq, search: RangeSearch, classes: Classes = own_rows
) -> Record:  # fmt: skip
    """Record per layer `scale`, `peak` and `use_log2`, [groups], and in the meta each seen group's fit and both errors.

    Args: classes: which steps share a row, by layer.
    """
    tensors: dict[str, Tensor] = {}
    choices: dict[str, list[dict[str, Any]]] = {}
    for name, quantizer in probability_quantizers(denoiser).items():
        rows, widths = operand_rows(quantizer, ranges, classes(name))
        samples = drawn_or_all(ranges, f"{name}|left", rows.positions, search)
        grids = [quantizer.grid.at(bits) for bits in widths.tolist()]
        found = [choose(p, grid, spec, search) for p, grid in zip(samples, grids, strict=True)]
        every = [found[i] for i in rows.of_group.tolist()]
        choices[name] = [{"group": group} | every[group] for group in rows.seen]
        for field in ("scale", "peak", "use_log2"):
            tensors[f"{name}|{field}"] = torch.tensor([row[field] for row in every])
    return Record(tensors, {"choices": choices})


def drawn_or_all(ranges: Record, key: str, positions: Tensor, search: RangeSearch) -> Tensor:
    """The sample of an operand that a grid is chosen by, float [classes, n], with its extremes where all must be covered (min-max).

    A search goes by what is common: an extreme, one value of millions, would count there as one of thousands.
    """
    if search.input_candidates == 1:
        return grouped_values(ranges, key, positions, None)
    return ranges.tensors[f"{key}|rows"][positions].flatten(1)


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
