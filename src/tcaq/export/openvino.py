"""OpenVINO: a denoiser with int8 convolutions and matrix products, whose scales are looked up by timestep inside the graph.

OpenVINO turns a convolution into integers where both operands come from quantizations with constant parameters. So the input is
divided by its step group's scale and moved by its zero point before a quantization whose step is 1, and products are scaled
behind the convolution. What the zero point adds to the sums depends on where the image ends: it is the convolution of a plane
of ones with the summed weights.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from tcaq.errors import CheckpointError, MissingExtraError
from tcaq.export.example import Example
from tcaq.export.folder import read_folder, write_folder
from tcaq.export.planes import Planes, most_exact
from tcaq.export.runtime import Predict
from tcaq.export.standin import Steps
from tcaq.export.traceable import Traceable
from tcaq.layers.weighted import QuantizedWeight
from tcaq.numerics.integers import BYTE

EXTRA, FORMAT, FILE = "openvino", "openvino", "model.xml"
Precision = Literal["f32", "bf16"]


class OpenVinoDialect:
    """Float arithmetic on whole numbers, in the patterns that OpenVINO computes in integers.

    It has none for products of two activations: OpenVINO joins an attention to one snippet, and has too few registers for some.
    """

    def __init__(self, vnni: bool = False) -> None:
        """Args: vnni: the graph will only run on processors with VNNI instructions.

        Others add pairs of products in 16 bits and clip the sums, so weights of 7 or 8 bits that meet inputs of 8 bits are written
        in another form for them: exact everywhere, but slower.
        """
        self.vnni = vnni

    def prepare(self, denoiser: nn.Module) -> None:
        """Nothing: OpenVINO joins what can be joined."""

    def zeros(self, zero_point: Tensor, second: bool = False) -> Tensor:
        """Whole numbers in float."""
        return zero_point

    def rows(self, layer: QuantizedWeight, top: int) -> Planes:
        """Signed bytes."""
        return Planes(layer, -BYTE[0] if self.vnni else most_exact(top))

    def quantize(
        self, x: Tensor, divisor: Tensor, zero: Tensor, top: int | Tensor, axis: int
    ) -> tuple[Tensor, Tensor | None]:
        """Codes as whole numbers in float, the zero point taken off where a signed byte holds what is left."""
        shape = [1] * x.dim()
        shape[axis] = -1
        units = x / divisor.reshape(shape)
        # a whole number clips before rounding as it does afterwards, and nothing comes between quantization and convolution
        if not isinstance(top, Tensor) and top <= BYTE[1]:
            units = torch.minimum(torch.maximum(units, -zero), top - zero)
            return torch.fake_quantize_per_tensor_affine(units, 1.0, 0, *BYTE), None
        units = units + zero
        if isinstance(top, Tensor):
            units, top = torch.minimum(units, top), 255
        return torch.fake_quantize_per_tensor_affine(units, 1.0, 0, 0, top), zero

    def conv(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, layer: nn.Conv2d, bias: Tensor,
        steps: Steps,
    ) -> Tensor:  # fmt: skip
        """A float convolution with a dequantized weight.

        Scaled before the zero point's share is taken off: OpenVINO would join a subtraction to a bare convolution, which then
        takes a third longer, and scaling passes over the products anyway.
        """
        planes = cast(Planes, rows)
        slide: Any = (layer.stride, layer.padding, layer.dilation)
        gain = planes.gain.reshape(-1, 1, 1, 1)
        products = conv2d(codes, planes.weight.float() * gain, None, *slide) * scale
        if zero is not None:
            sums = planes.weight.sum(1, keepdim=True, dtype=torch.float32) * gain
            key = tuple(int(side) for side in codes.shape[2:])
            if key not in steps.once:  # images of one size at one level of a denoiser
                steps.once[key] = torch.ones_like(codes[:1, :1])
            products = products - conv2d(steps.once[key], sums, None, *slide) * (zero * scale)
        return planes.total(products, 1) + bias.reshape(-1, 1, 1)

    def linear(
        self, codes: Tensor, zero: Tensor | None, scale: Tensor, rows: nn.Module, bias: Tensor | None = None
    ) -> Tensor:
        """A float product with a dequantized weight."""
        planes = cast(Planes, rows)
        products = linear(codes, planes.weight.float() * planes.gain.reshape(-1, 1)) * scale
        if zero is not None:
            products = products - planes.weight.sum(1, dtype=torch.float32) * planes.gain * (zero * scale)
        total = planes.total(products, codes.dim() - 1)
        return total if bias is None else total + bias


def require() -> None:
    """Raises: MissingExtraError if OpenVINO is not there."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("openvino", EXTRA) from error


def write_openvino(denoiser: nn.Module, example: Example, path: Path, vnni: bool = False) -> None:
    """Export a quantized denoiser.

    Args: path: of the `.xml` file; the weights go into a `.bin` beside it; vnni: see OpenVinoDialect.
    Raises: MissingExtraError; ModelError listing what cannot be exported.
    """
    require()
    write_traced(Traceable(denoiser, OpenVinoDialect(vnni), example.interface).eval(), example, path)


def write_traced(traced: nn.Module, example: Example, path: Path) -> None:
    """Export a function of an example's tensors."""
    import openvino

    inputs = zip(example.interface.inputs, example.values, strict=True)
    shapes = [[-1 if axis in given.free else size for axis, size in enumerate(value.shape)] for given, value in inputs]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: sizes that the model compares with its own configuration
        model = openvino.convert_model(traced, example_input=example.values, input=shapes)
    for port, name in zip(model.inputs, example.interface.names, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=False)


def open_openvino(path: Path, precision: Precision = "f32") -> Predict:
    """The model compiled for the CPU.

    Args: precision: of what is not in integers; OpenVINO alone would choose bf16 on processors that have it.
    Raises: MissingExtraError, CheckpointError if the file cannot be read.
    """
    require()
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    try:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    except RuntimeError as error:
        raise CheckpointError(f"OpenVINO cannot read {path}: {error}") from error

    def predict(*arrays: NDArray[Any]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = compiled(list(arrays))[0].copy()
        return result

    return predict


def load_openvino(folder: Path | str, precision: Precision = "f32") -> DiffusionPipeline:
    """The pipeline that `tcaq export --format openvino` wrote, its denoiser run by OpenVINO.

    Args: precision: of what is not in integers.
    Raises: MissingExtraError; CheckpointError if something is missing, damaged, or of another format.
    """
    return read_folder(Path(folder), FORMAT, FILE, partial(open_openvino, precision=precision))


def export_openvino(pipe: DiffusionPipeline, folder: Path | str, vnni: bool = False) -> None:
    """Write a quantized pipeline with its denoiser for OpenVINO.

    Args: vnni: it will only run on processors with VNNI instructions; see OpenVinoDialect.
    Raises: MissingExtraError; ModelError listing what cannot be exported; UsageError if `folder` holds something else.
    """
    require()
    write_folder(pipe, Path(folder), FORMAT, FILE, write_openvino, vnni)
