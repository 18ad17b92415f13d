"""A device that is not the CPU and needs no hardware: its tensors hold tensors of the CPU, and none may meet one from outside.

What PyTorch refuses on a GPU is refused here: an operation on tensors of two devices, unless one is a number (no dimensions), an
index, or a copy from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as tree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "elsewhere"
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_)


class Elsewhere(Tensor):
    """A tensor of the device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def untyped_storage(self) -> torch.UntypedStorage:
        """Tells what writes files which tensors share memory."""
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """What makes tensors out of nothing says by its argument `device` that it is meant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = is_here(kwargs.get("device")) or any(isinstance(x, Elsewhere) for x in tree.tree_leaves((args, kwargs)))
        return computed(func, args, kwargs) if here else func(*args, **kwargs)


def is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    leaves, spec = tree.tree_flatten((args, kwargs))
    check_together(func, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    inner = [leaf.inner if isinstance(leaf, Elsewhere) else leaf for leaf in leaves]
    inner_args, inner_kwargs = tree.tree_unflatten(inner, spec)
    target = kwargs.get("device")
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if target is not None and not is_here(target):
        return result
    known = {id(leaf.inner): leaf for leaf in leaves if isinstance(leaf, Elsewhere)}
    return tree.tree_map(lambda x: known.get(id(x), Elsewhere(x)) if isinstance(x, Tensor) else x, result)


def check_together(func: Any, tensors: list[Tensor]) -> None:
    here = [isinstance(tensor, Elsewhere) for tensor in tensors]
    if func in COPIES or all(here) or not any(here):
        return
    # the first of an indexing is what is indexed, the others are where
    indexed = func.overloadpacket in INDEXED
    for number, tensor in enumerate(tensors):
        where = indexed and number > 0 and not tensor.is_floating_point()
        if not here[number] and tensor.dim() and not where:
            raise RuntimeError(f"{func} was given tensors of the CPU and of another device")


def available() -> bool:
    """Whether this PyTorch can make a device in Python."""
    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside the block the device exists, and random numbers are drawn there as on the CPU.

    It must be entered before the process's first backward pass, which fixes which devices there are: in a process of its own.
    """
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME)
    with _Dispatch(), patch("tcaq.stages.learn.following", lambda generator, device: generator):
        yield torch.device(NAME, 0)
