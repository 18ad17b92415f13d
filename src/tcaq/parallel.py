"""One job in several processes. The only user of accelerate; with a single process every function is the identity.

Start with `accelerate launch` or `torchrun`. Work is dealt out item by item and results are added up, so that an
outcome does not depend on the number of processes, as long as each item carries its own seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce
from torch import Tensor

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return bool(_state().is_main_process)


def shard(items: Sequence[T]) -> Sequence[T]:
    """The share of this process: every n-th item. The shares are disjoint and together are all items."""
    state = _state()
    return items[state.process_index :: state.num_processes]


def sum_(tensor: Tensor) -> Tensor:
    """The sum over processes of a tensor, of the same shape and dtype on each; a new tensor on the same device."""
    state = _state()
    if state.num_processes == 1:
        return tensor.clone()
    return cast(Tensor, reduce(tensor.to(state.device), "sum")).to(tensor.device)


def mean(total: Tensor, count: int) -> Tensor:
    """The mean over all items of all processes, from this process's sum (any shape, floating) and its item count.

    Dividing once, after adding up, is right also when the shares differ in size.
    """
    return sum_(total) / sum_(total.new_tensor(count))


def _state() -> PartialState:
    """The process group; accelerate has to be told to use the CPU, else it ignores other processes there."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
