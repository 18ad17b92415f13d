"""Where integer kernels are tested, and with what numbers: every backend on the CPU, and on a GPU where there is one.

Without a GPU, Triton's interpreter runs its programs (tests/conftest.py asks for it), statement by statement, in numpy.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tcaq.integer.cpu import CPU
from tcaq.integer.cuda import CUDA
from tcaq.integer.cuda_triton import TRITON
from tcaq.integer.native.avx2_kernels import AVX2
from tcaq.integer.native.kernels import COMPILED

GPU = torch.cuda.is_available()
HERE = "cuda" if GPU else "cpu"
"""Where Triton's programs run."""
ON_GPU = pytest.mark.skipif(not GPU, reason="no CUDA device: the same arithmetic is tested on the CPU")
WITH_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
WITH_COMPILER = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
HAS_AVX2 = "AVX" in torch.backends.cpu.get_cpu_capability()
WITH_AVX2 = pytest.mark.skipif(shutil.which("cc") is None or not HAS_AVX2, reason="there is no C compiler, or no AVX2")
HAS_AVX512_VNNI = "avx512_vnni" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
WITH_AVX512_VNNI = pytest.mark.skipif(
    shutil.which("cc") is None or not HAS_AVX512_VNNI, reason="there is no C compiler, or no AVX-512 VNNI"
)
EACH = pytest.mark.parametrize(
    "maker", [pytest.param("AVX2", marks=WITH_AVX2), pytest.param("VNNI", marks=WITH_AVX512_VNNI)]
)
"""For tests of what both sets of instructions make."""
PLACES = [
    pytest.param((CPU, "cpu"), id="cpu"),
    pytest.param((COMPILED, "cpu"), id="cpu, compiled", marks=WITH_COMPILER),
    pytest.param((AVX2, "cpu"), id="cpu, AVX2", marks=WITH_AVX2),
    pytest.param((CUDA, "cpu"), id="cuda's arithmetic on the CPU"),
    pytest.param((CUDA, "cuda"), id="cuda", marks=ON_GPU),
    pytest.param((TRITON, HERE), id="triton" if GPU else "triton, interpreted", marks=WITH_TRITON),
]
EVERYWHERE = pytest.mark.parametrize("place", PLACES)
THREADS = pytest.mark.parametrize("threads", [1, 2])
"""For tests that set them, with `threads_after`."""


def numbers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype) -> Tensor:
    """The same random whole numbers at each call."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
