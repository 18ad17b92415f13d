"""What tests of integer kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def threads_after() -> Iterator[None]:
    """Leaves as many threads as there were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
