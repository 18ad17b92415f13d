"""Allocate inputs: a width for each layer's input by what its rounding does to predictions, within bits for all products (ours)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tcaq.layers.insert import quantized_layers
from tcaq.layers.modes import observing
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.numerics.affine import code_range, fake_quantize
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import Allocation
from tcaq.stages.allocate import chosen, requiring
from tcaq.stages.sensitivity import draw_batches, errors_by_call, predicted, predictions, signed

Rows = tuple[Tensor, Tensor]
"""Scale and zero point in each step group, float [groups]."""
Search = Callable[[], Record]
"""Finds scales for the grids that the inputs have at the time: a record as of `scale_inputs`."""
Layers = Mapping[str, QuantizedWeight]


def allocate_inputs(
    denoiser: nn.Module, trajectories: Trajectories, names: Sequence[str], spec: Allocation, search: Search, seed: int
) -> Record:  # fmt: skip
    """Record `bits`, int64 [layers], and why: `sensitivity`, float64 [layers, widths], and `sizes`, products for each image.

    As `allocate` does for weights, relative to the error that all of these inputs make together at the plan's width; weights and
    everything else are float. What an input's bit costs is counted in the products that read it.

    Args: denoiser: quantized, with its TCR vectors; names: of the layers that take part; seed: of inputs and signs.
    Raises: NumericalError if predictions or their gradients are not finite.
    """
    there = dict(quantized_layers(denoiser))
    layers = {name: cast(QuantizedWeight, there[name]) for name in names}
    plain = [layer.input_quantizer.grid.bits for layer in layers.values()]
    rows = rows_by_width(layers, {*spec.bits, *plain}, search)
    drawn = draw_batches(trajectories, spec, seed)
    with observing(denoiser):
        with counting(layers) as products:
            before = predictions(denoiser, drawn)
        with rounding(layers, {name: rows[bits][name] for name, bits in zip(layers, plain, strict=True)}):
            start = errors_by_call(drawn, before, predictions(denoiser, drawn))
        sensitivity = sensitivities(denoiser, drawn, layers, spec.bits, rows, start, seed)
    sizes = torch.tensor([products[name] for name in layers])
    return chosen(list(layers), sensitivity, sizes, plain, spec)


def apply_input_widths(denoiser: nn.Module, bits: Mapping[str, int]) -> None:
    """Give the inputs of layers their widths; scales must be found for them afterwards."""
    for name, layer in quantized_layers(denoiser):
        if name in bits:
            quantizer = cast(AffineQuantizer, cast(QuantizedWeight, layer).input_quantizer)
            quantizer.regrid(quantizer.grid.at(bits[name]))


def rows_by_width(layers: Layers, widths: set[int], search: Search) -> dict[int, dict[str, Rows]]:
    """The rows of every input at each width; the quantizers keep the grids that they have."""
    quantizers = {name: cast(AffineQuantizer, layer.input_quantizer) for name, layer in layers.items()}
    kept = {name: quantizer.grid for name, quantizer in quantizers.items()}
    found = {}
    try:
        for bits in widths:
            for quantizer in quantizers.values():
                quantizer.regrid(quantizer.grid.at(bits))
            tables = search().tensors
            found[bits] = {n: (tables[f"{n}|input|scale"], tables[f"{n}|input|zero_point"]) for n in layers}
    finally:
        for name, quantizer in quantizers.items():
            quantizer.regrid(kept[name])
    return found


def rounded(layer: QuantizedWeight, x: Tensor, bits: int, rows: Rows) -> Tensor:
    """An input on its grid of a width in the running step groups, in its own dtype."""
    quantizer = cast(AffineQuantizer, layer.input_quantizer)
    scale, zero_point = (quantizer.clock.row(table.to(x.device), x.dim()) for table in rows)
    ends = code_range(bits, quantizer.grid.signed)
    return fake_quantize(x, scale * layer.gain(x.dim()), zero_point, *ends).to(x.dtype)


@contextmanager
def hooked(layers: Layers, hook: Callable[[str, QuantizedWeight, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block every layer reads what `hook` makes of its input."""
    with ExitStack() as stack:
        for name, layer in layers.items():

            def before(_: nn.Module, args: tuple[Any, ...], name: str = name, layer: QuantizedWeight = layer) -> Any:
                return (hook(name, layer, args[0]), *args[1:])

            stack.callback(layer.register_forward_pre_hook(before).remove)
        yield


def rounding(layers: Layers, rows: Mapping[str, Rows]) -> AbstractContextManager[None]:
    """Inside the block the inputs of float layers are rounded by these rows, at the width that their grid has."""
    return hooked(layers, lambda name, layer, x: rounded(layer, x, layer.input_quantizer.grid.bits, rows[name]))


@contextmanager
def counting(layers: Layers) -> Iterator[dict[str, int]]:
    """Inside the block the products that each layer makes for one row of a batch are counted, by name."""
    found: dict[str, int] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():

            def after(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name, layer: Any = layer) -> None:
                found[name] = out.numel() // len(out) * layer.weight[0].numel()

            stack.callback(cast(nn.Module, layer).register_forward_hook(after).remove)
        yield found


def sensitivities(
    denoiser: nn.Module, drawn: Sequence[Drawn], layers: Layers, widths: Sequence[int],
    rows: Mapping[int, Mapping[str, Rows]], start: Tensor, seed: int,
) -> Tensor:  # fmt: skip
    """What `allocate_inputs` records of them, float64 [layers, widths], to first order in the rounding errors.

    Args: rows: by width and layer; start: squared error that counts as one, [calls, bands].
    """
    position = {name: i for i, name in enumerate(layers)}
    moved = torch.zeros(len(layers), len(widths), dtype=torch.float64)

    def tag(name: str, layer: QuantizedWeight, x: Tensor) -> Tensor:
        # a view of its own: the gradient is that of this layer's path alone, whoever else reads the tensor
        own = (x if x.requires_grad else x.detach().requires_grad_()).view_as(x)
        value = x.detach()  # a hook that refers to its own tensor would keep both until garbage is collected

        def take(gradient: Tensor) -> None:
            for j, bits in enumerate(widths):
                error = rounded(layer, value, bits, rows[bits][name]).float() - value.float()
                moved[position[name], j] += (gradient.float() * error).double().sum().cpu()

        own.register_hook(take)
        return own

    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(moved)
    with requiring(list(denoiser.parameters()), grad=False), hooked(layers, tag):
        for part in drawn:
            given = part[:]
            prediction = predicted(denoiser, replace(given, sample=given.sample.requires_grad_()))
            signed(prediction, start[part.calls], generator).backward()
            total += moved.square()
            moved.zero_()
    return total / sum(len(part) for part in drawn)
