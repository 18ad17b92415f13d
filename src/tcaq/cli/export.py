"""`tcaq export`: a checkpoint as ONNX or for OpenVINO."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tcaq.cli.app import app, console
from tcaq.cli.models import open_quantized
from tcaq.export import export_onnx, export_openvino, load_onnx, load_openvino, parity
from tcaq.processor import has_vnni


class Format(StrEnum):
    """Formats of other runtimes."""

    ONNX = "onnx"
    OPENVINO = "openvino"


EXPORTS = {Format.ONNX: (export_onnx, load_onnx), Format.OPENVINO: (export_openvino, load_openvino)}


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `tcaq quantize` wrote.")],
    form: Annotated[Format, typer.Option("--format", help="Runtime that the model is for.")],
    output: Annotated[Path, typer.Option(help="Folder for the exported pipeline.")],
    vnni: Annotated[
        bool,
        typer.Option(
            "--vnni", help="For processors with VNNI instructions alone: faster there, wrong and refused elsewhere."
        ),
    ] = False,
) -> None:
    """Write the quantized pipeline for another runtime, in integers; `sample` and `evaluate` take the result."""
    write, read = EXPORTS[form]
    pipe = open_quantized(folder)
    write(pipe, output, vnni)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    console.print(f"{output} written: {size / 2**20:.1f} MiB")
    if vnni and has_vnni() is False:
        console.print(
            "its predictions were not compared: this processor has no VNNI instructions, which it is made for"
        )
        return
    console.print(f"its predictions against those of {folder}: {parity(pipe, read(output)):.0f} dB")
