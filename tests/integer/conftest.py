"""What tests of integer kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def threads_after() -> Iterator[None]:
    """Leaves as many threads as there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def changed(tmp_path: Path, monkeypatch) -> Callable[..., None]:
    """Gives a module another C file, or another header beside it: with `new` where `old` was."""

    def change(module: ModuleType, old: str, new: str, name: str | None = None) -> None:
        changing = name or module.SOURCE.name
        for file in module.SOURCE.parent.glob("*.[ch]"):
            (tmp_path / file.name).write_text(file.read_text())
        text = (tmp_path / changing).read_text()
        assert old in text
        (tmp_path / changing).write_text(text.replace(old, new))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(module, "SOURCE", tmp_path / module.SOURCE.name)

    return change
