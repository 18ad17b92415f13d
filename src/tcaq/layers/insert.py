"""List a model's layers, and swap them for quantized ones as a plan says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.nn.modules.conv import _ConvNd

from tcaq.errors import PlanError
from tcaq.layers.attention import MIX, SCORES
from tcaq.layers.conv import QuantizedConv2d
from tcaq.layers.linear import QuantizedLinear
from tcaq.layers.processors import attach_products, is_attention, why_float
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.split import SplitConv2d, SplitLinear
from tcaq.layers.weighted import QuantizedWeight
from tcaq.quantizers.clock import StepClock
from tcaq.spec.plan import LayerGrids, LayerInfo, LayerKind, ResolvedPlan

QuantizedLayer = QuantizedWeight | QuantizedProduct
MULTIHEAD = "torch's MultiheadAttention reads its weight without calling it"


def list_layers(model: nn.Module) -> list[LayerInfo]:
    """Every convolution, linear layer and attention product of a model, in the order of its modules."""
    layers: list[LayerInfo] = []
    borrowed = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            kind: LayerKind = "linear" if isinstance(module, nn.Linear) else "conv"
            layers.append(LayerInfo(name, kind, fixed=MULTIHEAD if id(module) in borrowed else _why_float(module)))
        elif is_attention(module):
            why = why_float(module)
            layers += [LayerInfo(f"{name}.{SCORES}", "scores", fixed=why), LayerInfo(f"{name}.{MIX}", "mix", fixed=why)]
    return layers


def _why_float(module: nn.Module) -> str | None:
    """Why a layer cannot be quantized; None if it can."""
    if isinstance(module, QuantizedWeight):
        return None
    for plain in (nn.Conv2d, nn.Linear):
        if isinstance(module, plain):
            own = type(module).forward is plain.forward
            return None if own else f"a {plain.__name__} of a kind of its own, {type(module).__name__}"
    return f"{type(module).__name__}: of convolutions, only two-dimensional ones that are not transposed are quantized"


def insert(model: nn.Module, plan: ResolvedPlan, clock: StepClock) -> None:
    """Swap the planned layers of `model` in place; weights are shared, so float mode is bit-exact.

    Raises: PlanError, with the model untouched, if the model is quantized already or a planned layer is not there.
    """
    if any(True for _ in quantized_layers(model)):
        raise PlanError("the model is quantized already; load the original model to quantize it another way")
    there = {layer.name: layer.kind for layer in list_layers(model)}
    if missing := [layer for layer in plan.layers if there.get(layer.name) != layer.kind]:
        names = ", ".join(f"{layer.name!r} ({layer.kind})" for layer in missing)
        raise PlanError(f"the plan speaks of layers that the model does not have: {names}; resolve it for this model")
    grids = {layer.name: layer for layer in plan.layers}
    with next(model.parameters()).device:  # the new buffers belong beside the weights
        for name, module in list(model.named_modules()):
            layer = grids.get(name)
            if is_attention(module) and why_float(module) is None:
                attach_products(module, grids.get(f"{name}.{SCORES}"), grids.get(f"{name}.{MIX}"), clock)
            elif layer is not None and not layer.is_float:
                replace(model, name, _wrap(module, layer, clock))


def _wrap(module: nn.Module, grids: LayerGrids, clock: StepClock) -> nn.Module:
    if isinstance(module, nn.Conv2d):
        if grids.split is not None:
            return SplitConv2d.wrap(module, grids, clock)
        return QuantizedConv2d.wrap(module, grids, clock)
    if grids.split is not None:
        return SplitLinear.wrap(cast(nn.Linear, module), grids, clock)
    return QuantizedLinear.wrap(cast(nn.Linear, module), grids, clock)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule with a dotted name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).register_module(leaf, module)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Every quantized layer with its dotted name; products that the plan keeps in float are left out."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight) or (isinstance(module, QuantizedProduct) and module.operands):
            yield name, module


def channel_axis(layer: QuantizedLayer) -> int:
    """The axis of a layer's inputs that counts channels."""
    return layer.CHANNEL_AXIS if isinstance(layer, QuantizedWeight) else -1
