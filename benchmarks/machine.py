"""The machine that a benchmark runs on, in words."""

from __future__ import annotations

import platform
from pathlib import Path


def machine() -> str:
    """Cores and processor, from the system's own description where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
