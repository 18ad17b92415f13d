"""What other tools make of the float model, built on the spot. Every one of them is optional."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tcaq.errors import MissingExtraError
from tcaq.export import onnx as onnx_export
from tcaq.export import openvino as openvino_export
from tcaq.export.example import unconditional_example
from tcaq.export.parts import plain_upsampling
from tcaq.export.runtime import ExportedDenoiser, Predict
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import Trajectories

Calibration = Callable[[], Trajectories]
Peer = Callable[[DiffusionPipeline, Path, Calibration], "tuple[DiffusionPipeline, int | None]"]
BENCH = "bench"
SINUSOIDS = "time_proj"
"""Part of the names of what makes sines of the timestep: with timesteps in bytes no model would know its step."""


class FloatTraceable(nn.Module):
    """A float denoiser as a function of a batch and one timestep."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        plain_upsampling(denoiser)
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Predict, float [batch, out, height, width]."""
        return cast(Tensor, self.denoiser(sample, timestep, return_dict=False)[0])


def with_denoiser(pipe: DiffusionPipeline, denoiser: nn.Module) -> DiffusionPipeline:
    """The pipeline with another denoiser."""
    return type(pipe)(**(pipe.components | {find_denoiser(pipe)[0]: denoiser}))


def compiled(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The float model under torch.compile."""
    return with_denoiser(pipe, cast(nn.Module, torch.compile(find_denoiser(pipe)[1])))


def onnx_float(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, int]:
    """The float model in ONNX Runtime."""
    path = _onnx_float(pipe, work)
    return _exported(pipe, onnx_export.open_onnx(path), path), path.stat().st_size


def onnx_static(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, int]:
    """ONNX Runtime's `quantize_static`: QDQ, unsigned bytes for activations, signed ones per channel for weights."""
    source, path = _onnx_float(pipe, work), work / "onnx-static.onnx"
    if not path.exists():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            """Feeds recorded inputs."""

            def __init__(self) -> None:
                self.pairs: Iterator[dict[str, Any]] = iter(
                    {"sample": x.numpy(), "timestep": t.reshape(1).float().numpy()} for x, t in _pairs(calibration())
                )

            def get_next(self) -> dict[str, Any] | None:
                """The next inputs."""
                return next(self.pairs, None)

        nodes = _import("onnx").load(source, load_external_data=False).graph.node
        quantize_static(
            source, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_exclude=[node.name for node in nodes if SINUSOIDS in node.name],
        )  # fmt: skip
    return _exported(pipe, onnx_export.open_onnx(path), path), path.stat().st_size


def openvino_float(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, int]:
    """The float model in OpenVINO."""
    path = _openvino_float(pipe, work)
    return _exported(pipe, openvino_export.open_openvino(path), path), path.with_suffix(".bin").stat().st_size


def nncf(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, int]:
    """NNCF's post-training quantization, run by OpenVINO."""
    source, path = _openvino_float(pipe, work), work / "nncf.xml"
    if not path.exists():
        tool = _import("nncf")
        import openvino

        data = [(x.numpy(), t.reshape(1).float().numpy()) for x, t in _pairs(calibration())]
        float_ = tool.IgnoredScope(patterns=[f".*{SINUSOIDS}.*"], validate=False)
        model = tool.quantize(
            openvino.Core().read_model(source), tool.Dataset(data), subset_size=len(data), ignored_scope=float_
        )
        openvino.save_model(model, path, compress_to_fp16=False)
    return _exported(pipe, openvino_export.open_openvino(path), path), path.with_suffix(".bin").stat().st_size


def torchao(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, None]:
    """torchao's export path for x86: static int8, compiled. It fixes the batch to that of the calibration."""
    pt2e = _import("torchao.quantization.pt2e.quantize_pt2e", "torchao")
    x86 = _import("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao")
    pairs = [(x, t.reshape(1).float()) for x, t in _pairs(calibration())]
    traced = FloatTraceable(find_denoiser(pipe)[1]).eval()
    with torch.no_grad():
        graph: Any = torch.export.export(traced, pairs[0]).module()
        prepared: Any = pt2e.prepare_pt2e(
            graph, x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        )
        for pair in pairs:
            prepared(*pair)
        converted = pt2e.convert_pt2e(prepared)
    run: Any = torch.compile(converted)
    config = _import("torch._inductor.config")

    def predict(sample: Any, timestep: Any) -> Any:
        with torch.no_grad(), config.patch(freezing=True):  # its int8 kernels are chosen where weights are constants
            return run(torch.from_numpy(sample), torch.from_numpy(timestep)).numpy()

    return _exported(pipe, predict, Path("torchao")), None


def quanto(pipe: DiffusionPipeline, work: Path, calibration: Calibration) -> tuple[DiffusionPipeline, None]:
    """optimum-quanto: weights and activations of 8 bits."""
    tool = _import("optimum.quanto", "optimum-quanto")
    denoiser = find_denoiser(pipe)[1]
    tool.quantize(denoiser, weights=tool.qint8, activations=tool.qint8)
    with torch.no_grad(), tool.Calibration():
        for x, t in _pairs(calibration()):
            denoiser(x, t)
    tool.freeze(denoiser)
    return pipe, None


def _pairs(trajectories: Trajectories) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(trajectories.samples, trajectories.timesteps, strict=True)


def _exported(pipe: DiffusionPipeline, predict: Predict, path: Path) -> DiffusionPipeline:
    return with_denoiser(pipe, ExportedDenoiser(predict, cast(Any, find_denoiser(pipe)[1]).config, {path.name: ""}))


def _onnx_float(pipe: DiffusionPipeline, work: Path) -> Path:
    path = work / "onnx-fp32.onnx"
    if not path.exists():
        onnx_export.require()
        denoiser = find_denoiser(pipe)[1]
        onnx_export.write_traced(FloatTraceable(denoiser).eval(), unconditional_example(denoiser), path)
    return path


def _openvino_float(pipe: DiffusionPipeline, work: Path) -> Path:
    path = work / "openvino-fp32.xml"
    if not path.exists():
        openvino_export.require()
        denoiser = find_denoiser(pipe)[1]
        openvino_export.write_traced(FloatTraceable(denoiser).eval(), unconditional_example(denoiser), path)
    return path


def _import(module: str, package: str | None = None) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(package or module, BENCH) from error
