"""Runs go on where they stopped, bit for bit, and refuse whatever is not theirs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tcaq import runs
from tcaq.errors import RunError, UsageError
from tcaq.records import Record
from tcaq.runs import Run, _peak_memory

IDENTITY: dict[str, Any] = {
    "recipe": {"name": "tcaq", "rounds": 2, "bits": [4, 4]},
    "seed": 0,
    "versions": {"tcaq": "0.1.0", "torch": "2.13.0"},
}
ITEMS = ["down.0", "mid", "up.0"]


class Toy:
    """A tiny quantization: data, a series in which each item depends on the state left by the one before, an end."""

    def __init__(self, folder: Path, seed: float = 0, identity: dict[str, Any] = IDENTITY) -> None:
        self.folder, self.seed, self.identity = folder, seed, identity
        self.computed: list[str] = []
        self.progress: list[tuple[str, int, int, bool]] = []
        self.state = torch.zeros(3)

    def run(self, stop_at: str | None = None) -> Tensor:
        with Run.open(self.folder, self.identity, lambda *args: self.progress.append(args)) as run:
            self.state = run.step("collect/0", lambda: self.collect(stop_at), lambda record: record.tensors["x"])
            run.series("reconstruct/0", ITEMS, lambda item: self.fit(item, stop_at), self.apply)
            return run.step("end", lambda: Record({"s": self.state * 2}), lambda record: record.tensors["s"])

    def collect(self, stop_at: str | None) -> Record:
        self.note("collect/0", stop_at)
        return Record({"x": torch.randn(3, generator=torch.Generator().manual_seed(1)) + self.seed}, {"seeds": [1]})

    def fit(self, item: str, stop_at: str | None) -> Record:
        self.note(item, stop_at)
        return Record({"x": self.state * 1.1 + len(item)}, {"loss": float(self.state.sum())})

    def apply(self, item: str, record: Record) -> None:
        self.state = record.tensors["x"]

    def note(self, what: str, stop_at: str | None) -> None:
        if what == stop_at:
            raise KeyboardInterrupt
        self.computed.append(what)


def stage_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "stages").rglob("*")) if p.is_file()}


def test_files_and_values(tmp_path: Path) -> None:
    toy = Toy(tmp_path / "run")
    result = toy.run()
    expected = torch.randn(3, generator=torch.Generator().manual_seed(1))
    for item in ITEMS:
        expected = expected * 1.1 + len(item)
    assert torch.equal(result, expected * 2)
    assert list(stage_files(toy.folder)) == [
        "stages/collect/0.safetensors",
        "stages/end.safetensors",
        "stages/reconstruct/0/000-down.0.safetensors",
        "stages/reconstruct/0/001-mid.safetensors",
        "stages/reconstruct/0/002-up.0.safetensors",
    ]
    assert toy.progress == [
        ("collect/0", 0, 1, False),
        ("collect/0", 1, 1, False),
        ("reconstruct/0", 0, 3, False),
        ("reconstruct/0", 1, 3, False),
        ("reconstruct/0", 2, 3, False),
        ("reconstruct/0", 3, 3, False),
        ("end", 0, 1, False),
        ("end", 1, 1, False),
    ]


@pytest.mark.parametrize("stop_at", ["collect/0", *ITEMS])
def test_resume_after_an_interruption(tmp_path: Path, stop_at: str) -> None:
    whole = Toy(tmp_path / "whole")
    expected = whole.run()
    first, second = Toy(tmp_path / "run"), Toy(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        first.run(stop_at)
    assert torch.equal(second.run(), expected)
    assert [*first.computed, *second.computed] == ["collect/0", *ITEMS]  # nothing twice, nothing left out
    assert stage_files(second.folder) == stage_files(whole.folder)
    assert {done[0] for done in second.progress if done[3]} <= {"collect/0", "reconstruct/0"}
    assert sum(done[3] for done in second.progress) == len(first.computed)


def test_resume_of_a_finished_run_computes_nothing(tmp_path: Path) -> None:
    expected = Toy(tmp_path).run()
    again = Toy(tmp_path)
    assert torch.equal(again.run(), expected)
    assert again.computed == []


def test_a_changed_earlier_record_invalidates_later_ones(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    (tmp_path / "stages/collect/0.safetensors").unlink()
    changed = Toy(tmp_path, seed=0.5)
    result = changed.run()
    assert changed.computed == ["collect/0", *ITEMS]
    assert torch.equal(result, Toy(tmp_path / "fresh", seed=0.5).run())


def test_an_earlier_record_made_again_equal_keeps_later_ones(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    (tmp_path / "stages/reconstruct/0/001-mid.safetensors").unlink()
    again = Toy(tmp_path)
    again.run()
    assert again.computed == ["mid"]


def test_records_of_another_list_of_items_go_away(tmp_path: Path) -> None:
    for items in (["a", "b", "c"], ["a", "x"]):
        with Run.open(tmp_path, {}) as run:
            run.series("s", items, lambda item: Record({"x": torch.ones(1)}, {"name": item}), lambda *_: None)
    assert [item for item, _ in Run.read(tmp_path).results("s")] == ["a", "x"]


class Store:
    """A shared series whose items depend on nothing, and whose records differ each time they are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.computed: list[str] = []

    def get(self, *items: str) -> list[float]:
        found: list[float] = []
        with Run.share(self.folder, IDENTITY) as run:
            run.series("s", items, self.make, lambda _, record: found.append(float(record.tensors["x"])))
        return found

    def make(self, item: str) -> Record:
        self.computed.append(item)
        return Record({"x": torch.rand(())})


def test_a_shared_run_keeps_records_of_other_lists_of_items(tmp_path: Path) -> None:
    store = Store(tmp_path)
    a, b, c, rest = store.get("a", "b", "c", "rest")
    files = stage_files(tmp_path)
    assert store.get("a") == [a]
    assert store.get("a", "b") == [a, b]
    assert store.get("a", "b", "c", "rest") == [a, b, c, rest]
    assert store.computed == ["a", "b", "c", "rest"]
    assert stage_files(tmp_path) == files
    longer = store.get("a", "b", "c", "d", "e")  # goes on from what the lists have in common, beside the rest
    assert longer[:3] == [a, b, c]
    assert store.get("a", "b", "c", "d", "e") == longer
    assert store.get("a", "b", "c", "rest") == [a, b, c, rest]
    assert store.computed == ["a", "b", "c", "rest", "d", "e"]
    assert stage_files(tmp_path).items() >= files.items()


def test_a_shared_run_makes_anew_what_follows_a_changed_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = store.get("a", "b", "c")
    (tmp_path / "stages/s/000-a.safetensors").unlink()
    new = store.get("a", "b")
    assert store.get("a", "b", "c")[:2] == new
    assert store.computed == ["a", "b", "c", "a", "b", "c"]  # c, too: it stood behind another a
    assert not {*old} & {*store.get("a", "b", "c")}


def test_a_shared_run_goes_on_from_records_that_were_not_shared(tmp_path: Path) -> None:
    first, store = Store(tmp_path), Store(tmp_path)
    with Run.open(tmp_path, IDENTITY) as run:
        run.series("s", ["a", "b"], first.make, lambda *_: None)
    files = stage_files(tmp_path)
    store.get("a")
    store.get("a", "b", "c")
    assert store.computed == ["c"]
    assert stage_files(tmp_path).items() > files.items()


def test_items_with_awkward_names(tmp_path: Path) -> None:
    items = ["a/b c", "a b/c", "ü", "x" * 300]
    with Run.open(tmp_path, {}) as run:
        run.series("s", items, lambda item: Record({}, {"name": item}), lambda *_: None)
    found = list(Run.read(tmp_path).results("s"))
    assert [item for item, _ in found] == items
    assert [record.meta["name"] for _, record in found] == items


def test_apply_always_gets_what_is_on_disk(tmp_path: Path) -> None:
    seen: list[Any] = []
    for _ in range(2):
        with Run.open(tmp_path, {}) as run:
            run.step("a", lambda: Record({}, {"pair": (1, 2)}), lambda record: seen.append(record.meta["pair"]))
    assert seen == [[1, 2], [1, 2]]  # a list both times: also the first went through the file


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no count is known that begins with the process")
def test_peak_memory_is_not_that_of_the_parent() -> None:
    ballast = torch.ones(2**26)  # a quarter of a GiB
    own = _peak_memory()
    assert own > ballast.nbytes
    code = "from tcaq.runs import _peak_memory; print(_peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < own - ballast.nbytes // 2


def test_results_names_and_timings(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    run = Run.read(tmp_path)
    assert run.identity == IDENTITY
    assert run.finished() == ["collect/0", "end", "reconstruct/0"]
    assert [(item, list(record.tensors)) for item, record in run.results("reconstruct/0")] == [
        (item, ["x"]) for item in ITEMS
    ]
    ((item, record),) = run.results("collect/0")
    assert (item, record.meta["seeds"]) == ("collect/0", [1])
    assert list(run.results("absent")) == []
    timings = run.timings()
    assert sorted(timings) == [
        "collect/0",
        "end",
        "reconstruct/0/000-down.0",
        "reconstruct/0/001-mid",
        "reconstruct/0/002-up.0",
    ]
    assert all(entry["seconds"] >= 0 and entry["peak_memory"] > 10**7 for entry in timings.values())
    Toy(tmp_path).run()
    assert Run.read(tmp_path).timings() == timings  # a resumed step keeps the time it took


def test_a_run_open_for_reading_does_no_steps(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    with pytest.raises(UsageError, match="open for reading only"):
        Run.read(tmp_path).step("more", lambda: Record({}), lambda record: None)


@pytest.mark.parametrize("name", ["", "A", "a//b", "../a", "/a", "a b", "a/"])
def test_step_names(tmp_path: Path, name: str) -> None:
    with Run.open(tmp_path, {}) as run, pytest.raises(UsageError, match="named with"):
        run.step(name, lambda: Record({}), lambda record: None)


def test_a_name_occurs_once(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}) as run:
        run.step("a", lambda: Record({}), lambda record: None)
        with pytest.raises(UsageError, match="'a' occurs twice"):
            run.step("a", lambda: Record({}), lambda record: None)


# What is refused


def other(**changes: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(IDENTITY)), **changes}


def test_another_identity_is_named_key_by_key(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    before = stage_files(tmp_path)
    identity = other(recipe={"name": "tcaq", "rounds": 3, "bits": [4, 4], "daq": True}, seed=0)
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, identity)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} holds a run that differs from this one:",
        "  recipe.daq: nothing there, true now",
        "  recipe.rounds: 2 there, 3 now",
        f"Give another --output, or delete {tmp_path} to start over.",
    ]
    assert stage_files(tmp_path) == before
    Toy(tmp_path).run()  # and the refusal left the lock free


def test_of_many_differences_the_first_are_named(tmp_path: Path) -> None:
    def plan(bits: int) -> list[dict[str, Any]]:
        return [{"name": f"layer{number}", "weight": {"bits": bits}} for number in range(20)]

    Run.open(tmp_path, other(plan=plan(4), bits=4)).close()
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, other(plan=plan(8), bits=8))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  bits: 4 there, 8 now", "  plan.0.layer0.weight.bits: 4 there, 8 now"]
    assert lines[-2] == "  and 13 more"
    assert len(lines) == 11


def test_the_order_of_a_list_matters(tmp_path: Path) -> None:
    layers = [{"name": "a"}, {"name": "b"}]
    Run.open(tmp_path, other(plan=layers)).close()
    with pytest.raises(RunError, match=r'plan\.0\.a\.name: "a" there, nothing now'):
        Run.open(tmp_path, other(plan=layers[::-1]))


def test_other_versions_are_another_run_and_said_so(tmp_path: Path) -> None:
    Run.open(tmp_path, IDENTITY).close()
    with pytest.raises(RunError, match=r'versions\.torch: "2\.13\.0" there, "2\.14\.0" now\nOther versions can change'):
        Run.open(tmp_path, other(versions={"tcaq": "0.1.0", "torch": "2.14.0"}))


def test_order_of_keys_and_tuples_do_not_matter(tmp_path: Path) -> None:
    Run.open(tmp_path, {"a": 1, "b": (1, 2)}).close()
    Run.open(tmp_path, {"b": [1, 2], "a": 1}).close()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("")
    with pytest.raises(RunError, match=r"is not a run of tcaq and not empty \(it has photo\.png\)"):
        Run.open(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(RunError, match=r"is not a run of tcaq: it has no run\.json"):
        Run.read(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        Run.open(tmp_path / "file", IDENTITY)


def test_a_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "FORMAT", runs.FORMAT + 1)
        Run.open(tmp_path, IDENTITY).close()
    with pytest.raises(RunError, match=r"has format 2, this tcaq reads up to 1\. Update tcaq"):
        Run.open(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "x", "identity": 1}'])
def test_a_damaged_run_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json (is damaged|cannot be read)"):
        Run.open(tmp_path, IDENTITY)


def test_a_damaged_record_is_named_and_its_removal_heals(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    whole = stage_files(tmp_path)
    path = tmp_path / "stages/reconstruct/0/001-mid.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunError, match=r"001-mid\.safetensors is damaged.*Delete this file and run again"):
        Toy(tmp_path).run()
    path.unlink()
    Toy(tmp_path).run()
    assert stage_files(tmp_path) == whole


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    Toy(tmp_path).run()
    leftover = tmp_path / "stages/reconstruct/0/.001-mid.safetensors.999.tmp"
    leftover.write_text("half")
    Toy(tmp_path).run()
    assert not leftover.exists()


HOLD = """
import sys
from pathlib import Path
from tcaq.runs import Run, _peak_memory
run = Run.open(Path(sys.argv[1]), {})
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_two_processes_on_one_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunError, match="Another process is working on the run"):
        Run.open(tmp_path, {})
    assert Run.read(tmp_path).finished() == []
    holder.kill()
    holder.wait()
    Run.open(tmp_path, {}).close()  # a killed process holds nothing


def test_twice_in_one_process(tmp_path: Path) -> None:
    with Run.open(tmp_path, {}), pytest.raises(RunError, match="Another process"):
        Run.open(tmp_path, {})
    Run.open(tmp_path, {}).close()


def test_what_is_finished_of_a_shared_run_is_read_beside_another_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    values = store.get("a", "b")
    with Run.open(tmp_path, IDENTITY):
        assert store.get("a", "b") == values
        assert store.get("a") == values[:1]
        with pytest.raises(RunError, match="Another process is working on the run"):
            store.get("a", "b", "c")
    assert store.computed == ["a", "b"]
    assert store.get("a", "b", "c")[:2] == values
    Run.open(tmp_path, IDENTITY).close()  # and what locked it let go of it


def test_what_another_process_made_until_the_lock_was_free_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = Store(tmp_path), Store(tmp_path)
    acquire, made = runs._acquire, list[float]()

    def late(folder: Path) -> Any:
        monkeypatch.setattr(runs, "_acquire", acquire)
        made.extend(other.get("a", "b"))
        return acquire(folder)

    monkeypatch.setattr(runs, "_acquire", late)
    assert store.get("a", "b", "c")[:2] == made
    assert (other.computed, store.computed) == (["a", "b"], ["c"])


def test_a_shared_run_of_another_identity_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    Run.open(tmp_path, other(seed=1)).close()
    store = Store(tmp_path)
    with pytest.raises(RunError, match="seed: 1 there, 0 now"):
        store.get("a")
    assert store.computed == []


def test_a_closed_run_does_no_steps(tmp_path: Path) -> None:
    with Run.share(tmp_path, IDENTITY) as run:
        pass
    assert list(tmp_path.iterdir()) == []  # nothing was computed, so nothing is there
    with pytest.raises(UsageError, match="open for reading only"):
        run.step("more", lambda: Record({}), lambda record: None)


# SIGKILL. The script forks: each child does the run and is killed, a last one finishes it, and the files are compared.

KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path

import torch
from safetensors import torch as store

from tcaq import records
from tcaq.records import Record, read_json
from tcaq.runs import Run, _peak_memory

torch.set_num_threads(1)
root = Path(sys.argv[1])
kill_at, events = None, 0


def event(*args):
    global events
    events += 1
    if events == kill_at:
        if args:  # half of a file
            args[0].write_bytes(args[0].read_bytes()[: args[0].stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)


def watched(call):
    return lambda *args: (event(), call(*args))[1]


def save_file(tensors, path, metadata):
    store.save_file(tensors, path, metadata)
    event(path)


os.fsync, os.replace, records.save_file = watched(os.fsync), watched(os.replace), save_file


def quantize(folder, pause=0.0):
    state = {}

    def fit(item):
        event()
        time.sleep(pause)
        generator = torch.Generator().manual_seed(len(item))
        return Record({"x": state["x"] @ torch.randn(8, 8, generator=generator)}, {"loss": state["x"].sum().item()})

    with Run.open(folder, {"seed": 0}) as run:
        start = lambda: Record({"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(0))})
        run.step("collect/0", start, lambda record: state.update(record.tensors))
        for r in range(2):
            items = [f"unit.{'i' * i}" for i in range(3)]
            run.series(f"reconstruct/{r}", items, fit, lambda item, record: state.update(record.tensors))


def contents(folder):
    assert not list(folder.rglob(".*.tmp"))
    read_json(folder / "run.json"), read_json(folder / "timings.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "stages").rglob("*.safetensors")}


def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


quantize(root / "whole")
expected, total = contents(root / "whole"), events
assert len(expected) == 7
chosen = random.Random(int(sys.argv[2]))
for point in chosen.sample(range(1, total + 1), 24):
    kill_at, events, folder = point, 0, root / f"event-{point}"
    assert os.waitpid(child(lambda: quantize(folder)), 0)[1] == signal.SIGKILL, point
    kill_at = None
    quantize(folder)
    assert contents(folder) == expected, point
for number in range(6):  # killed from outside, several times in a row
    folder = root / f"time-{number}"
    for _ in range(3):
        pid = child(lambda: quantize(folder, pause=0.01))
        time.sleep(chosen.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    quantize(folder)
    assert contents(folder) == expected, number
print("equal")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_anywhere_and_started_again_gives_the_same_files(tmp_path: Path) -> None:
    seed = "20240611"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), seed], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
