"""Peak resident memory of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread

import psutil

from tcaq.allocator import release_freed_memory


@dataclass
class Peak:
    """Largest resident set of this process seen so far, in bytes."""

    bytes: int


@contextmanager
def track_peak(interval: float = 0.02) -> Iterator[Peak]:
    """Watch this process' resident set while the block runs; the yielded `Peak` holds the largest value seen.

    A thread samples every `interval` seconds, because the kernel's own high-water mark covers the life of the process
    and would report what an earlier block needed. Freed memory is handed back first for the same reason. Spikes shorter
    than the interval can be missed.
    """
    release_freed_memory()
    process = psutil.Process()
    peak = Peak(process.memory_info().rss)
    done = Event()

    def watch() -> None:
        while not done.wait(interval):
            peak.bytes = max(peak.bytes, process.memory_info().rss)

    thread = Thread(target=watch, name="track_peak", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.bytes = max(peak.bytes, process.memory_info().rss)
