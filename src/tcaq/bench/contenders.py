"""What is timed: the float model, ours in each of its ways to run, and what other tools make of the float model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from tcaq.bench import peers
from tcaq.bench.bout import Bout
from tcaq.checkpoint import load
from tcaq.errors import TcaqError
from tcaq.export import export_onnx, export_openvino, load_onnx, load_openvino
from tcaq.integer.lower import Products, lower
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import FULL_PRECISION
from tcaq.processor import has_vnni


class Unavailable(TcaqError):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A pipeline ready to sample, and the bytes of its denoiser on disk (None if it was never written)."""

    pipe: DiffusionPipeline
    size: int | None


class InHalf(nn.Module):
    """A denoiser in bfloat16 among float32 samplers: pipelines of U-Nets for pixels cannot turn bfloat16 into images."""

    dtype = torch.float32

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.config = denoiser, cast(Any, denoiser).config
        self.device = next(denoiser.parameters()).device

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        """Predict, float32."""
        return UNet2DOutput(sample=self.denoiser(sample.to(torch.bfloat16), timestep).sample.float())


Build = Callable[[Bout], Contender]
EXPORTS: dict[str, tuple[Callable[..., None], Callable[..., DiffusionPipeline]]] = {
    "onnx": (export_onnx, load_onnx),
    "openvino": (export_openvino, load_openvino),
}


def _fp32(bout: Bout, layout: torch.memory_format = torch.preserve_format) -> Contender:
    pipe = bout.load_float()
    denoiser = cast(Any, find_denoiser(pipe)[1]).to(memory_format=layout)
    return Contender(pipe, sum(p.numel() * p.element_size() for p in denoiser.parameters()))


def _compiled(bout: Bout) -> Contender:
    return Contender(peers.compiled(bout.load_float()), None)


def _bf16(bout: Bout, layout: torch.memory_format = torch.preserve_format) -> Contender:
    pipe = bout.load_float()
    denoiser = cast(Any, find_denoiser(pipe)[1]).to(torch.bfloat16).to(memory_format=layout)
    return Contender(_in_bfloat16(pipe), sum(p.numel() * p.element_size() for p in denoiser.parameters()))


def _in_bfloat16(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline whose denoiser is in bfloat16, made to sample."""
    if type(pipe).__name__ in FULL_PRECISION:
        return peers.with_denoiser(pipe, InHalf(find_denoiser(pipe)[1]))
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not find_denoiser(pipe)[1]:
            part.to(torch.bfloat16)
    return pipe


def _size(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in (folder / name).glob("*") if path.suffix != ".json")


def _ours(bout: Bout, execution: str, dtype: torch.dtype | None = None) -> Contender:
    pipe = load(bout.folder, dtype)
    if execution != "fake":
        products: Products = "fused" if execution == "fused" else "plan"
        lowering = lower(pipe, products, compiled=execution != "eager")
        if all(layer.execution == "fake" for layer in lowering.layers):
            raise Unavailable(lowering.layers[0].reason)
    size = _size(bout.folder, find_denoiser(pipe)[0])
    return Contender(pipe if dtype is None else _in_bfloat16(pipe), size)


def _exported(bout: Bout, form: str, **options: Any) -> Contender:
    folder = bout.work / form
    write, read = EXPORTS[form]
    if not folder.exists():
        write(load(bout.folder), folder, bool(has_vnni()))
    pipe = read(folder, **options)
    return Contender(pipe, _size(folder, find_denoiser(pipe)[0]))


def _peer(bout: Bout, build: peers.Peer) -> Contender:
    return Contender(*build(bout.load_float(), bout))


CONTENDERS: dict[str, Build] = {
    "fp32": _fp32,
    "fp32-channels-last": lambda bout: _fp32(bout, torch.channels_last),
    "fp32-compiled": _compiled,
    "bf16": _bf16,
    "bf16-channels-last": lambda bout: _bf16(bout, torch.channels_last),
    "fake": lambda bout: _ours(bout, "fake"),
    "integer": lambda bout: _ours(bout, "integer"),
    "integer-eager": lambda bout: _ours(bout, "eager"),
    "integer-fused": lambda bout: _ours(bout, "fused"),
    "integer-bf16": lambda bout: _ours(bout, "integer", torch.bfloat16),
    "onnx": lambda bout: _exported(bout, "onnx"),
    "openvino": lambda bout: _exported(bout, "openvino"),
    "openvino-bf16": lambda bout: _exported(bout, "openvino", precision="bf16"),
    "onnx-fp32": lambda bout: _peer(bout, peers.onnx_float),
    "onnx-static": lambda bout: _peer(bout, peers.onnx_static),
    "openvino-fp32": lambda bout: _peer(bout, peers.openvino_float),
    "nncf": lambda bout: _peer(bout, peers.nncf),
    "torchao": lambda bout: _peer(bout, peers.torchao),
    "quanto": lambda bout: _peer(bout, peers.quanto),
}
"""Builders by the name that the table shows."""
