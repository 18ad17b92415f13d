"""GPTQ: round a weight column by column, each column's error fed back to the columns still to come.

Frantar et al., *GPTQ: Accurate post-training quantization for generative pre-trained transformers*, ICLR 2023, algorithm 1: optimal
brain quantization in one fixed order for all rows, with the Cholesky factor of the inverse Hessian in place of an inverse that is
updated after every column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcaq.errors import NumericalError
from tcaq.numerics.affine import dequantize, quantize


@torch.no_grad()
def gptq_codes(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, *,
    damping: float = 0.01, block: int = 128,
) -> Tensor:  # fmt: skip
    """Codes of a weight that keep its products with inputs, rather than the weight itself, close to the original's.

    Columns go in the order of falling energy: what is rounded late has few columns left to make up for it (the public code's
    "activation order"). Under a diagonal Hessian there is nothing to feed back, and every weight goes to its nearest code.

    Args: weight: float [out, in]; hessian: float [in, in], sum of x x^T over inputs x, times anything; scale, zero_point: float
        [out]; low, high: code range; damping: added to the diagonal, as a part of its mean; block: columns whose errors reach the
        columns behind the block at once (a matter of speed alone).
    Returns: whole numbers within the code range, float64 [out, in]; computed in float64.
    Raises: NumericalError if the damped Hessian is not positive definite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = feedback(hessian[order][:, order], damping)
    scale, zero_point = scale.double(), zero_point.double()
    rest = weight.double()[:, order].T.contiguous()  # a column of the weight is a row here: contiguous
    codes = torch.empty_like(rest)
    for start in range(0, len(rest), block):
        stop = min(start + block, len(rest))
        errors = rest.new_empty(stop - start, rest.shape[1])
        for j in range(start, stop):
            codes[j] = quantize(rest[j], scale, zero_point, low, high)
            errors[j - start] = (rest[j] - dequantize(codes[j], scale, zero_point)) / factor[j, j]
            rest[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes[order.argsort()].T


def feedback(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1, H being the damped Hessian, float64 [in, in].

    Row j, divided by its first entry, says how the columns behind j make up for an error in column j once the columns before it
    are decided.

    Raises: NumericalError if H is not positive definite.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[diagonal == 0] = 1.0  # no input at all: nothing to make up for
    # H = R R^T with an upper triangular R, from the factorization of H read backwards; U is R's inverse
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed) or not bool(torch.isfinite(lower).all()):
        raise NumericalError(
            f"a Hessian of {len(hessian)} inputs is not positive definite; raise `gptq.damping`, which is {damping:g}"
        )
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return inverse
