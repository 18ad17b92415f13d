"""What the studies under benchmarks/ compute, where no study's run would show an error."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tcaq.records import Record
from tcaq.runs import Run

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it imports its neighbours: from its own folder."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def test_the_jackknife_gives_the_standard_error_of_a_mean(script):
    spread = script("spread")
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left_out = list(spread.without_each_block(features))
    assert [moments.count for moments in left_out] == [500 - 13] * 20 + [500 - 12] * 20
    for moments, part in zip(left_out, range(40), strict=True):
        kept = torch.cat([block for i, block in enumerate(features.tensor_split(40)) if i != part])
        torch.testing.assert_close(moments.mean, kept.mean(0))
    means = torch.stack([moments.mean[0] for moments in left_out])
    assert spread.error(means) == pytest.approx(float(features[:, 0].std()) / 500**0.5, rel=0.25)
    blocks = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = torch.stack([(blocks.sum() - block) / 39 for block in blocks])
    assert spread.error(exact) == pytest.approx(float(blocks.std()) / 40**0.5)  # of equal blocks it is the textbook's


def test_results_of_another_protocol_are_refused(script, tmp_path):
    stored, path = script("protocol").stored, tmp_path / "results.json"
    assert stored(path, {"num": 4}) == {"num": 4, "cells": {}}
    path.write_text(json.dumps({"num": 4, "cells": {"a": 1}}))
    assert stored(path, {"num": 4})["cells"] == {"a": 1}
    with pytest.raises(SystemExit, match="num 4 there, 5 now"):
        stored(path, {"num": 5})


def test_the_last_fit_of_a_run_is_found_among_its_rounds(script):
    refit = script("refit")

    class Scored:
        def __init__(self, *scores: float) -> None:
            self.scores = scores

        def finished(self) -> list[str]:
            return [f"score/{i}" for i in range(len(self.scores))]

        def results(self, name: str):
            yield name, type("Record", (), {"meta": {"fd": self.scores[int(name.rpartition("/")[2])]}})

    recipe = refit.Recipe(alignment={"rounds": 2})
    assert refit.fitted_on(Scored(), recipe) == "collect/3"
    assert refit.fitted_on(Scored(3.0, 2.0, 1.0), recipe) == "collect/3"
    assert refit.fitted_on(Scored(3.0, 4.0), recipe) == "collect/1"
    assert refit.fitted_on(Scored(3.0, 2.0, 5.0), recipe) == "collect/2"
    assert refit.fitted_on(Scored(), recipe.changed({"alignment": None})) == "collect/1"


def test_the_page_is_made_without_drawing(script, monkeypatch):
    page = script("page")
    monkeypatch.setattr(page, "draw", lambda *_: pytest.fail("drawn"))
    found = {path.stem: json.loads(path.read_text()) for path in page.RESULTS.glob("*.json")}
    assert page.page(found)[0] == "# Results"


def grown(**seconds: dict[str, float]) -> dict[str, object]:
    """What `tcaq bench` leaves of contenders whose seconds a step are these by batch."""
    rows = [{"name": name, "seconds": found, "problem": None} for name, found in seconds.items()]
    return {"processor": "a processor, 2 cores", "vnni": False, "threads": 2, "rows": rows}


def test_the_page_says_where_integers_stop_paying_and_on_what(script, monkeypatch):
    page = script("page")
    single = grown(**{"fp32": {"1": 1.0}, "bf16": {"1": 0.5}, "integer": {"1": 0.25}, "integer-fused": {"1": 0.25}})
    batches = grown(
        **{
            "fp32": {"1": 1.0, "8": 6.0},
            "bf16": {"1": 0.5, "8": 3.0},
            "integer": {"1": 2.0, "8": 2.0},
            "integer-fused": {"1": 2.0, "8": 2.0},
        }
    )
    lines = page.grown({"cifar10": {"w4a4": {"growth": {"batch": batches, "size": {"32": single, "64": single}}}}})
    assert "![times as fast as fp32 over batch and size](images/growth.png)" in lines
    assert any("without VNNI, 2 threads" in line for line in lines)
    assert any("by batch: `integer` does not pay at 1 (0.50 to 3.00 times fp32)" in line for line in lines)
    assert any("by size: `integer` pays throughout (4.00 to 4.00 times fp32)" in line for line in lines)


def test_a_machine_without_proc_has_a_name(script, monkeypatch):
    machine = script("machine")
    monkeypatch.setattr(machine, "Path", lambda _: Path("/nowhere/cpuinfo"))
    assert machine.machine() == machine.platform.processor()


def test_backgrounds_are_those_of_each_image_once(script, tmp_path):
    images = torch.randint(256, (12, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def part(item: str) -> Record:
        start, stop = map(int, item.split("-"))
        return Record({"images": images[start:stop]})

    for items in (["0-4", "4-8", "8-12"], ["0-3"], ["0-4", "4-8", "8-9"], ["0-4", "4-8", "8-11"]):
        with Run.share(tmp_path, {}) as run:
            run.series("images", items, part, lambda *_: None)
    assert torch.equal(script("background").sampled(tmp_path), images)


PARENT = """
import sys
from multiprocessing import get_context

sys.path.insert(0, sys.argv[1])
from orphan import end_with_parent


def wait(idle):
    end_with_parent()
    print("waits", flush=True)
    idle.get()


if __name__ == "__main__":
    context = get_context("spawn")
    idle = context.Queue()
    child = context.Process(target=wait, args=(idle,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


def test_a_process_ends_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script), str(FOLDER)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "waits\n"
    parent.kill()
    try:
        parent.communicate(timeout=30)  # until nobody can write any more
    except subprocess.TimeoutExpired:
        os.kill(child, signal.SIGKILL)
        parent.communicate()
        raise
