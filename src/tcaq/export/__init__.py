"""Quantized pipelines in other formats, and back in diffusers."""

from tcaq.export.folder import CARD, export_format
from tcaq.export.onnx import export_onnx, load_onnx
from tcaq.export.openvino import export_openvino, load_openvino
from tcaq.export.parity import parity
from tcaq.export.runtime import ExportedDenoiser

__all__ = [
    "CARD", "ExportedDenoiser", "export_format", "export_onnx", "export_openvino", "load_onnx", "load_openvino", "parity",
]  # fmt: skip
