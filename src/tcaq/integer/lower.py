"""Swap a quantized denoiser's layers for ones that compute in integers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import nn

from tcaq.allocator import release_freed_memory
from tcaq.errors import UsageError
from tcaq.integer.backend import Backend
from tcaq.integer.block import keep_blocks_in_place
from tcaq.integer.build import NoKernel, integer_layer
from tcaq.integer.cpu import CPU
from tcaq.integer.cuda import CUDA
from tcaq.integer.cuda_triton import TRITON
from tcaq.integer.native.avx2_kernels import AVX2, AVX2_NARROW, AVX2_WIDE
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.vnni_kernels import VNNI, VNNI_WIDE
from tcaq.integer.norm import keep_token_layout
from tcaq.integer.product import IntegerProduct, product_clock, uneven_groups
from tcaq.layers.insert import quantized_layers, replace
from tcaq.layers.processors import detach_products, has_products
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.denoiser import find_denoiser
from tcaq.models.quantizer import TcaqQuantizer

BACKENDS = {"cpu": (AVX2_NARROW, AVX2_WIDE, AVX2, VNNI, VNNI_WIDE, COMPILED, CPU), "cuda": (TRITON, CUDA)}
"""Kernels of each kind of device, the fastest first: a layer takes the first that run it exactly."""
Products = Literal["plan", "fused"]
Execution = Literal["integer", "fake", "float"]
LOG2 = "probabilities on a log2 grid are no whole numbers"
FUSED = "asked for: attention in one fused float operation"


@dataclass(frozen=True)
class LayerExecution:
    """How one layer runs after lowering, and if not in integers, why."""

    name: str
    execution: Execution
    reason: str = ""


@dataclass(frozen=True)
class Lowering:
    """What became of every quantized layer, in the model's order, and why faster kernels of the device were not there."""

    layers: tuple[LayerExecution, ...]
    missing: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[LayerExecution, ...]:
        """The layers that do not run in integers."""
        return tuple(layer for layer in self.layers if layer.execution != "integer")

    def summary(self) -> str:
        """A line of counts, then a line for each reason with the layers that it holds for, then what would make it faster."""
        lines = [f"{len(self.layers) - len(self.kept)} of {len(self.layers)} quantized layers run in integers"]
        for reason in dict.fromkeys((layer.execution, layer.reason) for layer in self.kept):
            names = [layer.name for layer in self.kept if (layer.execution, layer.reason) == reason]
            lines.append(f"{len(names)} {reason[0]}, {reason[1]}: {', '.join(names)}")
        return "\n".join([*lines, *(f"faster kernels are missing: {problem}" for problem in self.missing)])


class LoweredQuantizer(TcaqQuantizer):
    """What a lowered denoiser tells whoever wants its codes, to save or export or lower them: there are none any more."""

    has_codes = False

    @property
    def is_serializable(self) -> bool:
        """Raises: UsageError always."""
        raise UsageError(
            "a lowered pipeline holds no codes to save or export; use the checkpoint that it was loaded from"
        )


def lower(pipe: DiffusionPipeline, products: Products = "plan", compiled: bool = True) -> Lowering:
    """Let a quantized pipeline compute in integers, in place, on the device where its denoiser is.

    Codes are unpacked once into what the device's kernels multiply, and dropped; no float copy of a weight is left of the
    layers that run in integers. A layer without an exact kernel stays as it was (fake), and the result says why. Where nothing
    can run, everything stays and one warning says so.

    Args: pipe: loaded from a checkpoint, or quantized in memory; products: what becomes of the products in attention: `plan`,
        quantized as the plan says, in integers where both grids are even; `fused`, not quantized, in PyTorch's fused attention;
        compiled: whether what stands between a CPU's kernels, and kernels that PyTorch lacks, are compiled C where there is a
        compiler (the environment variable CC, else `cc`; it takes a few seconds, once on a machine), not PyTorch's operations.
    Raises: UsageError if the pipeline is not quantized.
    """
    denoiser = find_denoiser(pipe)[1]
    layers, quantizer = dict(quantized_layers(denoiser)), getattr(denoiser, "hf_quantizer", None)
    if not layers or not getattr(quantizer, "has_codes", True):
        raise UsageError(
            f"the denoiser of this {type(pipe).__name__} is not quantized (or lowered already); nothing to lower"
        )
    device = next(denoiser.parameters()).device.type
    problems = {
        backend: backend.missing()
        for backend in BACKENDS.get(device, ())
        if (compiled or not backend.compiled) and backend.helps()
    }
    usable = [backend for backend, problem in problems.items() if problem is None]
    if not usable:
        problem = "; ".join(dict.fromkeys(map(str, problems.values()))) or f"tcaq has no integer kernels for {device!r}"
        warnings.warn(f"{problem}; the model runs fake-quantized, in float", RuntimeWarning, stacklevel=2)
        return Lowering(tuple(LayerExecution(name, "fake", problem) for name in layers))
    _leave_file(denoiser)
    done = []
    for name in tuple(layers):
        done.append(_lower(denoiser, name, layers.pop(name), usable, products))
        release_freed_memory()  # what packing left behind, layer by layer, would come to as much again as the weights
    if products == "fused":
        _fuse(denoiser)
    keep_token_layout(denoiser)
    keep_blocks_in_place(denoiser)
    if quantizer is not None:
        denoiser.hf_quantizer = LoweredQuantizer(quantizer.quantization_config)
    return Lowering(tuple(done), _before(usable[0], problems))


def _before(backend: Backend, problems: Mapping[Backend, str | None]) -> tuple[str, ...]:
    """Why those that would come before a backend are not there."""
    return tuple(str(problem) for _, problem in takewhile(lambda item: item[0] is not backend, problems.items()))


def _lower(
    denoiser: nn.Module, name: str, layer: QuantizedWeight | QuantizedProduct, backends: Sequence[Backend], products: Products
) -> LayerExecution:  # fmt: skip
    if isinstance(layer, QuantizedProduct):
        if products == "fused":
            return LayerExecution(name, "float", FUSED)
        return _lower_product(denoiser, name, layer, backends)
    problems: list[str] = []
    for backend in backends:
        try:
            with torch.no_grad():
                replace(denoiser, name, integer_layer(layer, backend))
            return LayerExecution(name, "integer")
        except NoKernel as problem:
            problems.append(str(problem))
    return LayerExecution(name, "fake", "; ".join(dict.fromkeys(problems)))


def _lower_product(
    denoiser: nn.Module, name: str, layer: QuantizedProduct, backends: Sequence[Backend]
) -> LayerExecution:  # fmt: skip
    problems = {backend: backend.product_problem() for backend in backends}
    usable = [backend for backend, problem in problems.items() if problem is None]
    if not usable:
        return LayerExecution(name, "fake", "; ".join(dict.fromkeys(map(str, problems.values()))))
    replace(denoiser, name, IntegerProduct(layer, usable[0]))
    uneven, count = len(uneven_groups(layer)), product_clock(layer).count
    if uneven:
        return LayerExecution(name, "fake", f"{LOG2}, as they are in {uneven} of {count} step groups")
    return LayerExecution(name, "integer")


def _leave_file(denoiser: nn.Module) -> None:
    """Copy the checkpoint's tensors: each of them would hold the whole mapped file in memory, copies are freed one by one."""
    for parameter in denoiser.parameters():
        parameter.data = parameter.detach().clone()
    for module in denoiser.modules():
        # other data would not do: loaded buffers are views, which hold what they view
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


def _fuse(denoiser: nn.Module) -> None:
    """Give every attention the processor back that it had before its products became layers."""
    for module in list(denoiser.modules()):
        if has_products(module):
            detach_products(module)
