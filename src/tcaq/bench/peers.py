"""What other tools make of the float model, built on the spot. Every one of them is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor, nn

from tcaq.bench.bout import Bout
from tcaq.errors import MissingExtraError
from tcaq.export import onnx as onnx_export
from tcaq.export import openvino as openvino_export
from tcaq.export.example import Example, example_of, first_call
from tcaq.export.interface import TIMESTEP, Interface
from tcaq.export.parts import plain_norms, plain_upsampling
from tcaq.export.positions import free_positions
from tcaq.export.runtime import ExportedDenoiser, Predict
from tcaq.models.denoiser import find_denoiser
from tcaq.models.inputs import Inputs, prediction
from tcaq.models.nested import rebuilt

Peer = Callable[[DiffusionPipeline, Bout], "tuple[DiffusionPipeline, int | None]"]
"""Makes of a float pipeline, which it may change, another one, and says how many bytes its denoiser takes on disk."""
BENCH = "bench"
SINUSOIDS = "time_proj"
"""Part of the names of what makes sines of the timestep: with timesteps in bytes no model would know its step."""


class FloatTraceable(nn.Module):
    """A float denoiser as a function of tensors: those of an interface, one timestep for the whole batch."""

    def __init__(self, denoiser: nn.Module, interface: Interface) -> None:
        super().__init__()
        plain_upsampling(denoiser)
        plain_norms(denoiser)
        free_positions(denoiser)
        self.denoiser, self.interface = denoiser, (interface,)

    def forward(self, sample: Tensor, timestep: Tensor, *others: Tensor) -> Tensor:
        """Predict, in the shape of the denoiser's own prediction; others: what else the interface names, in its order."""
        options: Any = rebuilt(dict(zip(self.interface[0].names[2:], others, strict=True)))
        return prediction(self.denoiser(sample, timestep=timestep.expand(sample.shape[0]), **options))


def with_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module) -> DiffusionPipeline:
    """The pipeline with another denoiser."""
    return type(pipe)(**(pipe.components | {find_denoiser(pipe)[0]: denoiser}))


def compiled(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The float model under torch.compile, a graph for each number of images: one for all of them is slower."""
    return with_denoiser(pipe, cast(nn.Module, torch.compile(find_denoiser(pipe)[1], dynamic=False)))


def onnx_float(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, int]:
    """The float model in ONNX Runtime."""
    example = _example(pipe, bout)
    path = _onnx_float(pipe, bout.work, example)
    return _exported(pipe, onnx_export.open_onnx(path), path, example), path.stat().st_size


def onnx_static(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, int]:
    """ONNX Runtime's `quantize_static`: QDQ, unsigned bytes for activations, signed ones per channel for weights."""
    example = _example(pipe, bout)
    source, path = _onnx_float(pipe, bout.work, example), bout.work / "onnx-static.onnx"
    if not path.exists():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            """Feeds recorded inputs."""

            def __init__(self) -> None:
                names = example.interface.names
                found = (arrays(example.interface, inputs) for inputs in bout.calibration())
                self.calls: Iterator[dict[str, Any]] = iter(dict(zip(names, own, strict=True)) for own in found)

            def get_next(self) -> dict[str, Any] | None:
                """The next inputs."""
                return next(self.calls, None)

        nodes = _import("onnx").load(source, load_external_data=False).graph.node
        quantize_static(
            source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_exclude=[node.name for node in nodes if SINUSOIDS in node.name],
        )  # fmt: skip
    return _exported(pipe, onnx_export.open_onnx(path), path, example), path.stat().st_size


def openvino_float(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, int]:
    """The float model in OpenVINO."""
    example = _example(pipe, bout)
    path = _openvino_float(pipe, bout.work, example)
    return _exported(pipe, openvino_export.open_openvino(path), path, example), path.with_suffix(".bin").stat().st_size


def nncf(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, int]:
    """NNCF's post-training quantization, run by OpenVINO."""
    example = _example(pipe, bout)
    source, path = _openvino_float(pipe, bout.work, example), bout.work / "nncf.xml"
    if not path.exists():
        tool = _import("nncf")
        import openvino

        data = [arrays(example.interface, inputs) for inputs in bout.calibration()]
        float_ = tool.IgnoredScope(patterns=[f".*{SINUSOIDS}.*"], validate=False)
        model = tool.quantize(
            openvino.Core().read_model(source), tool.Dataset(data), subset_size=len(data), ignored_scope=float_
        )
        openvino.save_model(model, path, compress_to_fp16=False)
    return _exported(pipe, openvino_export.open_openvino(path), path, example), path.with_suffix(".bin").stat().st_size


def torchao(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, None]:
    """torchao's export path for x86: static int8, compiled for each number of images."""
    pt2e = _import("torchao.quantization.pt2e.quantize_pt2e", "torchao")
    x86 = _import("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao")
    example = _example(pipe, bout)
    calls = [tensors(example.interface, inputs) for inputs in bout.calibration()]
    traced = FloatTraceable(find_denoiser(pipe)[1], example.interface).eval()
    with torch.no_grad():
        graph = any_batch(traced, example.interface, calls[0])
        prepared: Any = pt2e.prepare_pt2e(
            graph, x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        )
        for given in calls:
            prepared(*given)
        converted = pt2e.convert_pt2e(prepared)
    run: Any = torch.compile(converted, dynamic=False)
    config = _import("torch._inductor.config")

    def predict(*given: Any) -> Any:
        with torch.no_grad(), config.patch(freezing=True):  # its int8 kernels are chosen where weights are constants
            return run(*map(torch.from_numpy, given)).numpy()

    return _exported(pipe, predict, Path("torchao"), example), None


def any_batch(traced: FloatTraceable, interface: Interface, call: tuple[Tensor, ...]) -> Any:
    """A denoiser as a graph for any number of images, exported from one call."""
    axes = [{0: torch.export.Dim.AUTO} if wanted.by_image else None for wanted in interface.inputs]
    others = [tuple(axes[2:])] if axes[2:] else []  # one entry for all that is behind the star
    return torch.export.export(traced, call, dynamic_shapes=(*axes[:2], *others)).module()


def quanto(pipe: DiffusionPipeline, bout: Bout) -> tuple[DiffusionPipeline, None]:
    """optimum-quanto: weights and activations of 8 bits."""
    tool = _import("optimum.quanto", "optimum-quanto")
    denoiser = find_denoiser(pipe)[1]
    tool.quantize(denoiser, weights=tool.qint8, activations=tool.qint8)
    with torch.no_grad(), tool.Calibration():
        for inputs in bout.calibration():
            inputs(denoiser)
    tool.freeze(denoiser)
    return pipe, None


def tensors(interface: Interface, inputs: Inputs) -> tuple[Tensor, ...]:
    """A recorded call, whose rows have one timestep, in the interface's order."""
    given = {interface.names[0]: inputs.sample, TIMESTEP: inputs.timestep[:1], **inputs.rows, **inputs.whole}
    return tuple(wanted.cast(given[wanted.name]) for wanted in interface.inputs)


def arrays(interface: Interface, inputs: Inputs) -> tuple[NDArray[Any], ...]:
    """The same as arrays."""
    return tuple(value.numpy() for value in tensors(interface, inputs))


def _example(pipe: DiffusionPipeline, bout: Bout) -> Example:
    return example_of(find_denoiser(pipe)[1], first_call(pipe, bout.conditions))


def _exported(pipe: DiffusionPipeline, predict: Predict, path: Path, example: Example) -> DiffusionPipeline:
    config = cast(Any, find_denoiser(pipe)[1]).config
    return with_denoiser(pipe, ExportedDenoiser(predict, config, {path.name: ""}, example.interface))


def _onnx_float(pipe: DiffusionPipeline, work: Path, example: Example) -> Path:
    path = work / "onnx-fp32.onnx"
    if not path.exists():
        onnx_export.require()
        traced = FloatTraceable(find_denoiser(pipe)[1], example.interface).eval()
        onnx_export.write_traced(traced, example, path)
    return path


def _openvino_float(pipe: DiffusionPipeline, work: Path, example: Example) -> Path:
    path = work / "openvino-fp32.xml"
    if not path.exists():
        openvino_export.require()
        traced = FloatTraceable(find_denoiser(pipe)[1], example.interface).eval()
        openvino_export.write_traced(traced, example, path)
    return path


def _import(module: str, package: str | None = None) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(package or module, BENCH) from error
