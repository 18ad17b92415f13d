"""Peak memory of one contender, in a process of its own: what others leave behind would count as its own.

Nor does the code of PyTorch count, which the system reads page by page when it is first used: more than twenty MiB, and more for
integers, which need other parts of it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from tcaq.bench.bout import Bout
from tcaq.bench.contenders import CONTENDERS
from tcaq.errors import TcaqError
from tcaq.evaluate.memory import track_peak
from tcaq.models.load import load_pipeline
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.reference import load_pipeline as load_reference

REFERENCE = "reference"


def open_float(model: str) -> Any:
    """The float pipeline that a name means."""
    return load_reference() if model == REFERENCE else load_pipeline(model)


RUNTIMES = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "nncf": ("openvino",),
    "torchao": ("torchao",),
    "quanto": ("optimum.quanto",),
}
"""What contenders import, by the first word of their name."""


def peak_memory(bout: Bout, name: str, batch: int, steps: int) -> int | str:
    """Bytes that loading and sampling take beyond the interpreter and its libraries, or why they are not known."""
    task = {
        "folder": str(bout.folder),
        "model": bout.model,
        "work": str(bout.work),
        "name": name,
        "batch": batch,
        "steps": steps,
    }
    command = [sys.executable, "-m", "tcaq.bench.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    if done.returncode == 0 and lines:
        return int(lines[-1])
    code, said = done.returncode, done.stderr.strip().splitlines()[-1:]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return ": ".join([f"memory not measured, its process {how}", *said])


def _measure(task: dict[str, Any]) -> int:
    bout = Bout(Path(task["folder"]), task["model"], Path(task["work"]), lambda: open_float(task["model"]))
    _use_libraries()
    _import_runtime(task["name"])
    _read_code()
    before = psutil.Process().memory_info().rss
    with track_peak(interval=0.005) as peak:
        contender = CONTENDERS[task["name"]](bout)
        sample(contender.pipe, image_seeds("bench", 0, 0, task["batch"]), task["steps"], bout.conditions)
    return int(peak.bytes - before)


def _use_libraries() -> None:
    """Sample from a network of next to no size."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    tiny = UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, **blocks)
    sample(DDIMPipeline(tiny.eval(), DDIMScheduler()), [0], 1)


def _import_runtime(name: str) -> None:
    """Import what a contender runs in, which is no part of the model; one that is not there will say so itself."""
    for package in RUNTIMES.get(name.partition("-")[0], ()):
        with suppress(ImportError):
            import_module(package)


def _read_code() -> None:
    """Touch every page of the libraries that are loaded, where the system says where they are."""
    for part in psutil.Process().memory_maps(grouped=False) if sys.platform.startswith("linux") else ():
        if ".so" in Path(part.path).suffixes and part.perms.startswith("r"):
            start, stop = (int(address, 16) for address in part.addr.split("-"))
            memoryview((ctypes.c_char * (stop - start)).from_address(start))[:: mmap.PAGESIZE].tobytes()


if __name__ == "__main__":
    try:
        sys.stdout.write(f"\n{_measure(json.loads(sys.argv[1]))}\n")
    except TcaqError as error:
        sys.exit(str(error))
