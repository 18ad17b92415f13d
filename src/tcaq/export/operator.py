"""Operators of ONNX that PyTorch does not write, inside a traced function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Operator(torch.autograd.Function):
    """An operator of ONNX inside a traced function; in the trace itself it only has a shape."""

    @staticmethod
    def forward(
        ctx: Any, name: str, dtype: torch.dtype, attributes: dict[str, Any], like: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        return torch.zeros_like(like, dtype=dtype)

    @staticmethod
    def symbolic(g: Any, name: str, dtype: torch.dtype, attributes: dict[str, Any], like: Any, *inputs: Any) -> Any:
        return g.op(name, *inputs, **{f"{key}_i": value for key, value in attributes.items()})


def operator(
    name: str, dtype: torch.dtype, inputs: tuple[Tensor | None, ...], like: Tensor, **attributes: Any
) -> Tensor:
    """Apply an operator of ONNX whose result has the shape of `like`."""
    result: Tensor = _Operator.apply(name, dtype, attributes, like, *inputs)  # type: ignore[no-untyped-call]
    return result
