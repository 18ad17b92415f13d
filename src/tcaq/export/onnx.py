"""ONNX: a denoiser with products of integers, whose scales are looked up by timestep inside the graph.

Convolutions are products of their windows. The usual pairs of QuantizeLinear and DequantizeLinear around a float Conv become
integer arithmetic in ONNX Runtime only where the convolution's output is quantized, too, which ours is not.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from tcaq.errors import CheckpointError, MissingExtraError
from tcaq.export.columns import MIDDLE, Columns
from tcaq.export.example import Example
from tcaq.export.folder import read_folder, write_folder
from tcaq.export.interface import BATCH
from tcaq.export.operator import operator
from tcaq.export.parts import joined_group_norms
from tcaq.export.runtime import Predict
from tcaq.export.shared import Shared
from tcaq.export.standin import Codes, Steps
from tcaq.export.traceable import Traceable
from tcaq.export.windows import windows
from tcaq.layers.weighted import QuantizedWeight

EXTRA, FORMAT, FILE = "onnx", "onnx", "model.onnx"
OPSET = 18
DOMAIN = "com.microsoft"
PRODUCT = f"{DOMAIN}::MatMulIntegerToFloat"
"""ONNX Runtime's own, of codes, weights, their scales and zero points, and a bias."""


class OnnxDialect:
    """Integer operators of ONNX, which take zero points."""

    def __init__(self, vnni: bool = False) -> None:
        """Args: vnni: the graph will only run on processors with VNNI instructions."""
        self.vnni = vnni

    def prepare(self, denoiser: nn.Module) -> None:
        """Group norms in fewer passes."""
        joined_group_norms(denoiser)

    def zeros(self, zero_point: Tensor, second: bool = False) -> Tensor:
        """Bytes; those of a right operand are signed where products of such are exact, which ONNX Runtime has faster code for."""
        return (zero_point - MIDDLE).to(torch.int8) if second and self.vnni else zero_point.to(torch.uint8)

    def rows(self, layer: QuantizedWeight, top: int) -> Columns:
        """A byte a code."""
        return Columns(layer, top, self.vnni)

    def quantize(
        self, x: Tensor, divisor: Tensor, zero: Tensor, top: int | Tensor, axis: int
    ) -> tuple[Tensor, Tensor | None]:
        """One QuantizeLinear; it takes a divisor for each channel, but is fast only where channels come first."""
        if len(divisor) > 1 and axis != 1:
            x, divisor = x / divisor, torch.ones(1)
        kind, low = zero.dtype, -MIDDLE if zero.dtype is torch.int8 else 0
        codes = operator("QuantizeLinear", kind, (x, divisor, zero.expand(len(divisor))), x, axis=axis)
        if not isinstance(top, Tensor) and top == 255:
            return codes, zero
        limits = torch.tensor(low, dtype=kind), (torch.as_tensor(top) + low).to(kind).reshape(())
        return operator("Clip", kind, (codes, *limits), codes), zero

    def conv(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, layer: nn.Conv2d, bias: Tensor,
        steps: Steps,
    ) -> Tensor:  # fmt: skip
        """A product with the windows."""
        seen = windows(codes, cast(Tensor, zero), layer, steps)
        products = [self.linear(part, zero, scale, rows, bias) for part in seen.rows]
        return seen.images(products[0] if len(products) == 1 else torch.cat(products, 1))

    def linear(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, bias: Tensor | None = None
    ) -> Tensor:
        """One operator."""
        columns, more = cast(Columns, rows), () if bias is None else (bias,)
        like = codes.new_zeros(*codes.shape[:-1], columns.weight.shape[1])
        return operator(
            PRODUCT, torch.float32, (codes, columns.weight, scale, columns.gain, zero, columns.zero, *more), like
        )

    def product(self, left: Codes, right: Codes, scale: float) -> Tensor:
        """One operator."""
        like = torch.matmul(left.codes.float(), right.codes.float())
        operands = left.codes, right.codes, left.scale * scale, right.scale, left.zero, right.zero
        return operator(PRODUCT, torch.float32, operands, like)


def require() -> None:
    """Raises: MissingExtraError if a package of the extra is not there."""
    for package in ("onnx", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, EXTRA) from error


def write_onnx(denoiser: nn.Module, example: Example, path: Path, vnni: bool = False) -> None:
    """Export a quantized denoiser.

    The model is traced, not exported by way of `torch.export`: that takes over a minute of symbolic shapes for a model that is
    traced in three seconds, and what is traced here was made for it: no value decides the way.

    Args: path: of the `.onnx` file; vnni: see OnnxDialect.
    Raises: MissingExtraError; ModelError listing what cannot be exported.
    """
    require()
    write_traced(Traceable(denoiser, OnnxDialect(vnni), example.interface).eval(), example, path)


def write_traced(traced: nn.Module, example: Example, path: Path) -> None:
    """Export a function of an example's tensors."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes that the model compares with its own configuration
        torch.onnx.export(
            traced, example.values, path, dynamo=False, opset_version=OPSET, input_names=example.interface.names,
            output_names=["prediction"], dynamic_axes=example.interface.free, custom_opsets={DOMAIN: 1},
        )  # fmt: skip


def open_onnx(path: Path) -> Predict:
    """Sessions of ONNX Runtime on the CPU. Raises: MissingExtraError, CheckpointError if the file cannot be read."""
    require()
    single = _session(path, 1)
    by_image = [given.shape[:1] == [BATCH] for given in single.get_inputs()]
    return Shared(
        _predict(single), lambda threads: _predict(_session(path, threads)), by_image, torch.get_num_threads()
    )


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would keep a core busy for a while after each prediction, while the scheduler's work waits
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base
        raise CheckpointError(f"ONNX Runtime cannot read {path}: {error}") from error


def _predict(session: Any) -> Predict:
    names = [given.name for given in session.get_inputs()]

    def predict(*arrays: NDArray[Any]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = session.run(["prediction"], dict(zip(names, arrays, strict=True)))[0]
        return result

    return predict


def load_onnx(folder: Path | str) -> DiffusionPipeline:
    """The pipeline that `tcaq export --format onnx` wrote, its denoiser run by ONNX Runtime.

    Raises: MissingExtraError; CheckpointError if something is missing, damaged, or of another format.
    """
    return read_folder(Path(folder), FORMAT, FILE, open_onnx)


def export_onnx(pipe: DiffusionPipeline, folder: Path | str, vnni: bool = False) -> None:
    """Write a quantized pipeline with its denoiser as ONNX.

    Args: vnni: it will only run on processors with VNNI instructions; see OnnxDialect.
    Raises: MissingExtraError; ModelError listing what cannot be exported; UsageError if `folder` holds something else.
    """
    require()
    write_folder(pipe, Path(folder), FORMAT, FILE, write_onnx, vnni)
