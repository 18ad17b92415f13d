"""A directory that holds everything a quantization produced, so that it can stop anywhere and go on later.

    run.json                                  identity: recipe, plan, seed, hash of the float weights, versions
    stages/observe.safetensors                one record for each step,
    stages/reconstruct/0/003-mid_block.safetensors   or for each item of a series
    timings.json                              seconds and memory; apart, since they differ between equal runs

Each record carries a stamp, the hash of the identity, of its own name, and of the contents of every record before it.
A record is used again only if its stamp fits, so what depends on something that changed is computed anew.
What comes after a record has no part in its stamp: a series that ends earlier, or goes on, finds its records as they were.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar, cast

from filelock import FileLock, Timeout

from tcaq.errors import RunError, UsageError
from tcaq.records import JSON, TEMPORARY, Record, canonical, read_json, write_json

T = TypeVar("T")

FORMAT = 1
SHOWN = 8
"""How many differences between two runs an error names."""
_LOCK = ".lock"
_NAME = re.compile(r"[a-z0-9_-]+(/[a-z0-9_-]+)*")


class OnProgress(Protocol):
    """Called before a stage (`done` 0) and after each of its items; `resumed` says the item came from disk."""

    def __call__(self, stage: str, done: int, total: int, resumed: bool) -> None: ...


def silent(stage: str, done: int, total: int, resumed: bool) -> None:
    """Show no progress."""


class Run:
    """One run directory. Open it to work with `Run.open` or `Run.share`, as a context manager; to look at it with `Run.read`."""

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, JSON],
        lock: FileLock | None = None,
        on_progress: OnProgress = silent,
        shared: bool = False,
    ) -> None:
        """Use `Run.open`, `Run.share` or `Run.read` instead. Neither locked nor shared, the run is for reading only."""
        self.folder = folder
        self.identity = identity
        self._lock = lock
        self._on_progress = on_progress
        self._shared = shared
        self._chain = _hash(identity)
        self._names: set[str] = set()

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, JSON], on_progress: OnProgress = silent) -> Run:
        """Start a run in a new or empty folder, or go on with the run of the same identity that is in it.

        Args:
            folder: the run directory.
            identity: all that determines the result; versions of libraries under the key `versions`.
            on_progress: told about every stage and item.

        Raises:
            RunError: the folder holds another run, something that is no run, a run of a newer format, or a run that
                another process is working on.
        """
        wanted = json.loads(canonical(dict(identity)))
        return cls(folder, wanted, _start(folder, wanted), on_progress)

    @classmethod
    def share(cls, folder: Path, identity: Mapping[str, JSON], on_progress: OnProgress = silent) -> Run:
        """Like `open`, for records that several commands use: none is removed, and reading them needs no lock.

        A series may have more or fewer items than it had before: those of other lists stay, and of two lists that begin
        alike, the common items are computed once. The first record that has to be computed locks the folder, so what
        `open` raises is raised there.
        """
        return cls(folder, json.loads(canonical(dict(identity))), on_progress=on_progress, shared=True)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Open a run to look at its results, even while another process works on it."""
        return cls(folder, _read_identity(folder))

    def close(self) -> None:
        """Let other processes work on this run."""
        if self._lock is not None:
            self._lock.release()
        self._lock, self._shared = None, False

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, name: str, compute: Callable[[], Record], apply: Callable[[Record], T]) -> T:
        """Do one step, or take its record from disk if it was done before.

        Args:
            name: lower-case words, `/` for levels (`collect/0`); once in a run.
            compute: makes the record. Must depend on nothing but the identity and the records before it.
            apply: puts the record into the model, or turns it into a value. Always gets it as read from disk, so that
                resumed and undisturbed runs take the same path.

        Raises:
            RunError: a record is damaged, or cannot be written.
        """
        self._begin(name, 1)
        record, resumed = self._obtain(name, name, compute)
        result = apply(record)
        self._on_progress(name, 1, 1, resumed)
        return result

    def series(
        self, name: str, items: Sequence[str], compute: Callable[[str], Record], apply: Callable[[str, Record], None]
    ) -> None:
        """Like `step` for each item in order, one file each: an interruption costs at most one item.

        Records of another list of items go away, unless the run is shared.
        """
        self._begin(name, len(items))
        files = [f"{name}/{index:03d}-{_slug(item)}" for index, item in enumerate(items)]
        if not self._shared:
            for path in {*self._files(name)} - {*map(self._path, files)}:
                path.unlink()
        for done, (item, file) in enumerate(zip(items, files, strict=True), start=1):
            record, resumed = self._obtain(file, item, partial(compute, item))
            apply(item, record)
            self._on_progress(name, done, len(items), resumed)

    def results(self, name: str) -> Iterator[tuple[str, Record]]:
        """The finished records of a step or series, in order, each with its item (the name itself for a step).

        Those of a shared run's series are of all its lists of items.
        """
        alone = self._path(name)
        for path in [alone] if alone.exists() else self._files(name):
            record = Record.load(path)
            yield record.meta["provenance"]["item"], record

    def finished(self) -> list[str]:
        """The names of all steps and series that have a record, in alphabetical order."""
        root = self.folder / "stages"
        found = (path.relative_to(root) for path in root.rglob("*.safetensors"))
        names = {path.parent if re.match(r"\d{3,}-", path.name) else path.with_suffix("") for path in found}
        return sorted(name.as_posix() for name in names)

    def timings(self) -> dict[str, dict[str, float]]:
        """For each record by its file name: `seconds` it took, and `peak_memory` of the process by then in bytes."""
        path = self.folder / "timings.json"
        return dict(read_json(path)) if path.exists() else {}

    def _begin(self, name: str, total: int) -> None:
        if self._lock is None and not self._shared:
            raise UsageError(
                f"The run in {self.folder} is open for reading only. Open it with Run.open to do {name!r}."
            )
        if not _NAME.fullmatch(name):
            raise UsageError(f"A step is named with a-z, 0-9, _ and -, and / between levels, got {name!r}.")
        if name in self._names:
            raise UsageError(f"The step {name!r} occurs twice in one run. Number it, as in {name}/0 and {name}/1.")
        self._names.add(name)
        self._on_progress(name, 0, total, False)

    def _obtain(self, file: str, item: str, compute: Callable[[], Record]) -> tuple[Record, bool]:
        """The record of one file as read from disk, and whether it was there before."""
        path = self._path(file)
        stamp = _hash([self._chain, file, item])
        record = _fitting(path, stamp)
        if record is None and self._lock is None:
            self._lock = _start(self.folder, self.identity)
            record = _fitting(path, stamp)  # another process may have made it until then
        resumed = record is not None
        if record is None:
            start = time.perf_counter()
            fresh = compute()
            seconds = time.perf_counter() - start
            Record(fresh.tensors, {**fresh.meta, "provenance": {"item": item, "stamp": stamp}}).save(path)
            self._note(file, seconds)
            record = Record.load(path)
        self._chain = _hash([stamp, record.digest])
        return record, resumed

    def _note(self, file: str, seconds: float) -> None:
        entry = {"seconds": round(seconds, 3), "peak_memory": _peak_memory()}
        write_json(self.folder / "timings.json", {**self.timings(), file: entry})

    def _path(self, file: str) -> Path:
        return self.folder / "stages" / f"{file}.safetensors"

    def _files(self, name: str) -> list[Path]:
        return sorted((self.folder / "stages" / name).glob("[0-9]*-*.safetensors"))


def _hash(value: JSON) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _slug(item: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", item).strip("-.")[:80]


def _fitting(path: Path, stamp: str) -> Record | None:
    """The record in a file, if there is one and it has this stamp."""
    record = Record.load(path) if path.exists() else None
    return record if record is not None and record.meta.get("provenance", {}).get("stamp") == stamp else None


def _start(folder: Path, identity: Mapping[str, JSON]) -> FileLock:
    """Lock a folder, and make it the run of this identity or make sure that it is; what it raises is in `Run.open`."""
    _check_ours(folder)
    lock = _acquire(folder)
    try:
        for leftover in list(folder.rglob(f".*{TEMPORARY}")):  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if (folder / "run.json").exists():
            _check_same(folder, _read_identity(folder), identity)
        else:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(folder / "run.json", {"format": FORMAT, "created": created, "identity": identity})
    except BaseException:
        lock.release()
        raise
    return lock


def _check_ours(folder: Path) -> None:
    """Refuse a folder with foreign things in it, before anything is written there."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file. Give a folder as --output.")
    if not folder.exists() or (folder / "run.json").exists():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != _LOCK and path.suffix != TEMPORARY)
    if others:
        raise RunError(f"{folder} is not a run of tcaq and not empty (it has {others[0]}). Give another --output.")


def _acquire(folder: Path) -> FileLock:
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"Another process is working on the run in {folder}. Wait for it, or stop it.") from error
    except OSError as error:
        raise RunError(f"{folder} cannot be used as a run directory ({error}). Give another --output.") from error
    return lock


def _read_identity(folder: Path) -> Mapping[str, JSON]:
    path = folder / "run.json"
    if not path.exists():
        raise RunError(f"{folder} is not a run of tcaq: it has no run.json.")
    content = read_json(path)
    try:
        version, identity = int(content["format"]), dict(content["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged. Delete {folder} or give another --output.") from error
    if version > FORMAT:
        raise RunError(f"{folder} has format {version}, this tcaq reads up to {FORMAT}. Update tcaq.")
    return identity


def _check_same(folder: Path, found: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> None:
    there, here = _flatten(found), _flatten(wanted)
    keys = [key for key in sorted({*there, *here}) if there.get(key, "nothing") != here.get(key, "nothing")]
    if not keys:
        return
    keys.sort(key=lambda key: key.count("."))  # what was asked for before what follows from it, layer by layer
    lines = [f"  {key}: {there.get(key, 'nothing')} there, {here.get(key, 'nothing')} now" for key in keys[:SHOWN]]
    if len(keys) > SHOWN:
        lines.append(f"  and {len(keys) - SHOWN} more")
    if any(key.startswith("versions.") for key in keys):
        lines.append("Other versions can change results, so a run goes on only with the versions it began with.")
    lines.append(f"Give another --output, or delete {folder} to start over.")
    raise RunError("\n".join([f"{folder} holds a run that differs from this one:", *lines]))


def _flatten(value: JSON, prefix: str = "") -> dict[str, str]:
    """Leaves of nested objects under dotted keys, as JSON text; those in a list go by their place and, if they have one, name."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        items = cast("list[Mapping[str, JSON]]", value)
        value = {
            ".".join(map(str, (place, item["name"]) if "name" in item else (place,))): item
            for place, item in enumerate(items)
        }
    if not isinstance(value, Mapping) or not value:
        return {prefix: canonical(value)}
    dot = f"{prefix}." if prefix else ""
    return {key: leaf for name, inner in value.items() for key, leaf in _flatten(inner, f"{dot}{name}").items()}


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    # the kernel's other count survives exec, so that a child would begin with what its parent needed
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
