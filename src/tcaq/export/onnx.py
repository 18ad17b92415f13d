"""ONNX: a denoiser with integer convolutions and matrix products, whose scales are looked up by timestep inside the graph.

The graph multiplies codes with `ConvInteger` and `MatMulInteger`, whose sums are exact, and scales them in float. The usual
pairs of QuantizeLinear and DequantizeLinear around a float Conv become integer arithmetic in ONNX Runtime only where the
convolution's output is quantized, too, which ours is not.
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
from torch.nn.functional import conv2d

from tcaq.errors import CheckpointError, MissingExtraError
from tcaq.export.example import Example
from tcaq.export.folder import read_folder, write_folder
from tcaq.export.runtime import Predict
from tcaq.export.traceable import Traceable

EXTRA, FORMAT, FILE = "onnx", "onnx", "model.onnx"
OPSET = 18
MIDDLE = 128


class OnnxDialect:
    """Integer operators of ONNX.

    Convolutions keep unsigned weights: where inputs are unsigned, too, ONNX Runtime multiplies them exactly on every processor.
    Signed inputs take half the time of those, but without VNNI their sums are clipped; signed weights have no vector code.
    """

    conv_clips, linear_clips = False, True

    def __init__(self, vnni: bool = False) -> None:
        """Args: vnni: the graph will only run on processors with VNNI instructions."""
        self.conv_offset = MIDDLE if vnni else 0

    def conv_weight(self, weight: Tensor) -> Tensor:
        """Unsigned, with a zero point of 128."""
        return (weight.to(torch.int16) + MIDDLE).to(torch.uint8)

    def quantize(
        self, x: Tensor, divisor: Tensor, zero_point: Tensor, top: int | Tensor, axis: int, offset: int = 0
    ) -> Tensor:
        """One QuantizeLinear; it takes a divisor for each channel, but is fast only where channels come first."""
        if len(divisor) > 1 and axis != 1:
            x, divisor = x / divisor, torch.ones(1)
        kind = torch.int8 if offset else torch.uint8
        zero = (zero_point - offset).to(kind)
        operands = (divisor, zero.expand(len(divisor))) if len(divisor) > 1 else (divisor.reshape(()), zero.reshape(()))
        codes = operator("QuantizeLinear", kind, (x, *operands), x, axis=axis)
        if isinstance(top, Tensor):
            limits = (torch.tensor(-offset, dtype=kind), _scalar(top - offset, kind))
            return operator("Clip", kind, (codes, *limits), codes)
        return codes if top == 255 else codes.clamp(max=top - offset)

    def conv(
        self, codes: Tensor, zero_point: Tensor, scale: Tensor, weight: Tensor, gain: Tensor, layer: nn.Conv2d
    ) -> Tensor:
        """One ConvInteger."""
        stride, pads, dilation = list(layer.stride), [int(p) for p in layer.padding], list(layer.dilation)
        like = conv2d(
            codes.float(), weight.float(), None, layer.stride, cast("tuple[int, int]", layer.padding), layer.dilation
        )
        operands = codes, weight, _scalar(zero_point, codes.dtype), torch.tensor(MIDDLE, dtype=torch.uint8)
        sums = operator(
            "ConvInteger", torch.int32, operands, like, kernel_shape=list(weight.shape[2:]), strides=stride, pads=pads * 2,
            dilations=dilation, group=layer.groups,
        )  # fmt: skip
        return sums.float() * (gain * scale).reshape(-1, 1, 1)

    def linear(self, codes: Tensor, zero_point: Tensor, scale: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        """One MatMulInteger."""
        operands = (codes, weight.t(), _scalar(zero_point, codes.dtype))
        like = codes.new_zeros(*codes.shape[:-1], len(weight))
        return operator("MatMulInteger", torch.int32, operands, like).float() * (gain * scale)


def _scalar(code: Tensor, kind: torch.dtype) -> Tensor:
    return code.to(kind).reshape(())


class _Operator(torch.autograd.Function):
    """An operator of ONNX inside a traced function; in the trace itself it only has a shape."""

    @staticmethod
    def forward(
        ctx: Any, name: str, dtype: torch.dtype, attributes: dict[str, Any], like: Tensor, *inputs: Tensor
    ) -> Tensor:
        return torch.zeros_like(like, dtype=dtype)

    @staticmethod
    def symbolic(g: Any, name: str, dtype: torch.dtype, attributes: dict[str, Any], like: Any, *inputs: Any) -> Any:
        return g.op(name, *inputs, **{f"{key}_i": value for key, value in attributes.items()})


def operator(name: str, dtype: torch.dtype, inputs: tuple[Tensor, ...], like: Tensor, **attributes: Any) -> Tensor:
    """Apply an operator of ONNX whose result has the shape of `like`."""
    result: Tensor = _Operator.apply(name, dtype, attributes, like, *inputs)  # type: ignore[no-untyped-call]
    return result


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

    Args: path: of the `.onnx` file; vnni: see Traceable.
    Raises: MissingExtraError; ModelError listing what cannot be exported.
    """
    require()
    write_traced(Traceable(denoiser, OnnxDialect(vnni), example.interface, vnni).eval(), example, path)


def write_traced(traced: nn.Module, example: Example, path: Path) -> None:
    """Export a function of an example's tensors."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes that the model compares with its own configuration
        torch.onnx.export(
            traced, example.values, path, dynamo=False, opset_version=OPSET, input_names=example.interface.names,
            output_names=["prediction"], dynamic_axes=example.interface.free,
        )  # fmt: skip


def open_onnx(path: Path) -> Predict:
    """A session of ONNX Runtime on the CPU. Raises: MissingExtraError, CheckpointError if the file cannot be read."""
    require()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would keep a core busy for a while after each prediction, while the scheduler's work waits
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no public base
        raise CheckpointError(f"ONNX Runtime cannot read {path}: {error}") from error
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

    Args: vnni: it will only run on processors with VNNI instructions; see Traceable.
    Raises: MissingExtraError; ModelError listing what cannot be exported; UsageError if `folder` holds something else.
    """
    require()
    write_folder(pipe, Path(folder), FORMAT, FILE, write_onnx, vnni)
