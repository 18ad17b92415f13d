"""What the processor is and which instructions it has."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset(("avx512_vnni", "avx_vnni", "asimddp"))
"""As Linux names instructions that add four products of bytes into 32 bits at once; the last is ARM's."""


@cache
def has_vnni() -> bool | None:
    """Whether the processor says that it has VNNI instructions; None where it cannot be asked."""
    words = _cpuinfo().split()
    return any(word in _VNNI for word in words) if words else None


def processor() -> str:
    """The processor's name and its number of cores."""
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unknown processor")
    return f"{name}, {os.cpu_count()} cores"


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text()
    except OSError:
        return ""
