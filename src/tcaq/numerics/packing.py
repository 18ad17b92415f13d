"""Integer codes of 1 to 8 bits stored densely: a little-endian bit stream in bytes.

Code `i` occupies bits `i*bits` to `(i+1)*bits - 1` of the stream, and bit `j` of the stream is bit `j % 8` of byte
`j // 8`. So at 4 bits the first of two codes sits in the low half of a byte, at 8 bits packing copies, and at 3, 5, 6
or 7 bits codes cross byte borders without waste. Unused bits of the last byte are zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tcaq.errors import UsageError

_GROUP = 8  # eight codes of b bits fill exactly b bytes, whatever b is


def packed_length(count: int, bits: int) -> int:
    """The bytes that `count` codes of `bits` bits take."""
    _check_bits(bits)
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely.

    Args:
        codes: uint8 of any shape, every value below `2**bits`; read in row-major order.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 `[ceil(n * bits / 8)]` on the device of `codes`, where `n` is the number of codes.

    Raises:
        UsageError: `bits` is outside 1 to 8, `codes` is not uint8, or a code does not fit.
    """
    length = packed_length(codes.numel(), bits)
    if codes.dtype != torch.uint8:
        raise UsageError(f"pack takes codes of dtype uint8, got {str(codes.dtype).removeprefix('torch.')}.")
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise UsageError(f"pack at {bits} bits takes codes 0 to {2**bits - 1}, got {int(flat.max())}.")
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % _GROUP)).view(-1, _GROUP)
    packed = flat.new_zeros(groups.shape[0], bits)
    for i in range(_GROUP):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= groups[:, i] << shift  # bits beyond the byte fall off
        if shift + bits > 8:
            packed[:, byte + 1] |= groups[:, i] >> (8 - shift)
    return packed.view(-1)[:length]


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that `pack` was given.

    Args:
        packed: uint8 `[ceil(prod(shape) * bits / 8)]`.
        bits: width of a code, 1 to 8.
        shape: shape of the codes.

    Returns:
        uint8 of the given shape, on the device of `packed`.

    Raises:
        UsageError: `bits` is outside 1 to 8, or `packed` does not have the dtype and length that `shape` requires.
    """
    count = math.prod(shape)
    length = packed_length(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (length,):
        dtype = str(packed.dtype).removeprefix("torch.")
        raise UsageError(
            f"unpack of {count} codes {list(shape)} at {bits} bits takes uint8 [{length}], "
            f"got {dtype} {list(packed.shape)}."
        )
    if 8 % bits == 0:  # whole codes in every byte: few operations, which keeps compiled graphs small
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        whole = packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and(2**bits - 1)
        return whole.view(-1)[:count].reshape(tuple(shape))
    stream = torch.nn.functional.pad(packed, (0, -length % bits)).view(-1, bits)
    codes = packed.new_empty(stream.shape[0], _GROUP)
    for i in range(_GROUP):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, byte] >> shift
        if shift + bits > 8:
            code = code | (stream[:, byte + 1] << (8 - shift))
        codes[:, i] = code & (2**bits - 1)
    return codes.view(-1)[:count].reshape(tuple(shape))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UsageError(f"Packed codes have 1 to 8 bits, got {bits}.")
