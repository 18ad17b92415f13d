"""What becomes of freed memory: the C library can keep it for the next tensor, or hand it back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Names of `mallopt` in malloc.h of the GNU C library."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory; True where it can be told so (GNU C library).

    By default large tensors come straight from the system and go straight back, and the kernel clears each of their
    pages anew: a quarter of the time of a fake-quantized step on a CPU. Results are the same bit for bit. For a
    program to call (the `tcaq` command does), not for a library: this is a setting of the whole process.
    """
    mallopt = _function("mallopt")
    wanted = ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26))
    return mallopt is not None and all(mallopt(name, value) for name, value in wanted)


def release_freed_memory() -> None:
    """Hand freed memory back to the system, so that what a process holds is what it uses; does nothing elsewhere."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    """A function of the C library; None where there is none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
