"""Records survive the disk bit for bit, and a damaged file never passes for a whole one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tcaq import records
from tcaq.errors import RunError
from tcaq.records import Record, read_json, write_json

BASE = torch.arange(12, dtype=torch.float32).reshape(3, 4)
TENSORS: dict[str, Tensor] = {
    "bool": torch.tensor([True, False, True]),
    "int8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "uint8": torch.tensor([[0], [255]], dtype=torch.uint8),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "bfloat16": torch.tensor([1.0, -0.0, 3.14159], dtype=torch.bfloat16),
    "float16": torch.tensor([6e-8, 65504.0], dtype=torch.float16),
    "float64": torch.tensor([0.1, 1e-310, float("inf"), float("nan")], dtype=torch.float64),
    "empty": torch.empty(0, 5),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "base": BASE,
    "transposed": BASE.t(),
    "row": BASE[1],
    "same": BASE,
    "expanded": torch.tensor([2.5]).expand(4),
}
META = {"loss": [0.5, 0.25], "name": "día", "nested": {"none": None, "flag": True}, "third": 1 / 3}


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "record.safetensors"
    Record(TENSORS, META).save(path)
    return path


def test_round_trip_is_bit_exact(saved: Path) -> None:
    loaded = Record.load(saved)
    assert loaded.meta == META
    assert set(loaded.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        back = loaded.tensors[name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        assert bits(back) == bits(tensor), name
    assert loaded.digest == Record(TENSORS, META).digest


def test_parameters_can_be_saved(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    Record({"p": parameter}).save(tmp_path / "r.safetensors")
    assert torch.equal(Record.load(tmp_path / "r.safetensors").tensors["p"], torch.ones(2))


def test_equal_records_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    Record(dict(reversed(TENSORS.items())), dict(reversed(META.items()))).save(again)
    assert again.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        Record({"a": torch.tensor([1.0, 2.0])}, {"k": 2}),
        Record({"a": torch.tensor([1.0, 3.0])}, {"k": 1}),
        Record({"b": torch.tensor([1.0, 2.0])}, {"k": 1}),
        Record({"a": torch.tensor([[1.0, 2.0]])}, {"k": 1}),
        Record({"a": torch.tensor([1.0, 2.0]).view(torch.int32)}, {"k": 1}),
        Record({}, {"k": 1}),
    ],
)
def test_digest_sees_every_difference(other: Record) -> None:
    assert other.digest != Record({"a": torch.tensor([1.0, 2.0])}, {"k": 1}).digest


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(RunError, match=r"record\.safetensors is damaged.*Delete this file and run again"):
        Record.load(saved)


def test_any_flipped_byte_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    whole = Record.load(saved)
    for position in range(0, len(content), 7):
        altered = bytearray(content)
        altered[position] ^= 1
        saved.write_bytes(altered)
        try:
            loaded = Record.load(saved)
        except RunError:
            continue
        assert loaded.digest == whole.digest, position  # only padding and spelling of the header may change unnoticed


def test_foreign_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(RunError, match="is not a record"):
        Record.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.safetensors"):
        Record.load(tmp_path / "absent.safetensors")


def test_newer_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records, "FORMAT", records.FORMAT + 1)
        Record({}).save(tmp_path / "r.safetensors")
    with pytest.raises(RunError, match=r"format 2, this tcaq reads up to 1\. Update"):
        Record.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_earlier_file(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, call, full)
    with pytest.raises(RunError, match=r"record\.safetensors cannot be written.*disk is full: free some space"):
        Record({"a": torch.ones(3)}).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from tcaq.errors import RunError
from tcaq.records import Record, write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda p: Record({"a": torch.ones(9999)}).save(p), lambda p: write_json(p, list(range(9999)))):
    try:
        write(Path(sys.argv[1]) / "big")
    except RunError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_the_system_refuses_to_write(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("big cannot be written") == 2, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*Check that the folder can be written to"):
        Record({}).save(tmp_path / "file" / "r.safetensors")


def test_json_round_trip_and_failures(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, META)
    assert read_json(path) == META
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, [float("nan")])
    assert read_json(path) == META
    path.write_text("{")
    with pytest.raises(RunError, match=r"b\.json cannot be read as JSON"):
        read_json(path)
