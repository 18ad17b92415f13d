from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import psutil, torch
from tcaq.allocator import keep_freed_memory, release_freed_memory

def held(): return psutil.Process().memory_info().rss // 2**20

told = keep_freed_memory()
before = held()
block = torch.ones(50 * 2**20)
del block
kept = held()
release_freed_memory()
print(told, kept - before, held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a C library without mallopt")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    told, kept, after = run.stdout.split()
    assert told == "True"
    assert int(kept) > 150
    assert int(after) < 50
