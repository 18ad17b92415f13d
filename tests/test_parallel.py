"""Two processes come to the same result as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

SCRIPT = """
import json, sys
import torch
from tcaq.parallel import is_main, mean, shard, sum_

items = list(range(7))
values = {i: torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in items}
mine = shard(items)
local = torch.stack([values[i] for i in mine]).sum(0)
counts = torch.zeros(7, dtype=torch.int64)
counts[torch.tensor(mine)] = 1
total, average, each = sum_(local), mean(local, len(mine)), sum_(counts)
print(json.dumps({"main": is_main(), "mine": mine, "sum": total.tolist(), "mean": average.tolist(),
                  "each": each.tolist(), "input": counts.sum().item()}))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def launch(count: int) -> list[dict[str, object]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    base = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    alone = {key: value for key, value in base.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    processes = []
    for rank in range(count):
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        group = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env={**alone, **group},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    return results


def test_two_processes_equal_one() -> None:
    (alone,) = launch(1)
    first, second = launch(2)
    assert alone["mine"] == list(range(7))
    assert (first["mine"], second["mine"]) == ([0, 2, 4, 6], [1, 3, 5])
    assert (alone["main"], first["main"], second["main"]) == (True, True, False)
    for key in ("sum", "mean"):
        assert first[key] == second[key]
        assert all(abs(a - b) <= 1e-14 for a, b in zip(alone[key], first[key], strict=True))  # type: ignore[call-overload]
    assert first["each"] == second["each"] == [1] * 7
    assert (first["input"], second["input"]) == (4, 3)  # what goes in is left as it was
