"""Triton's programs against exact arithmetic: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tcaq.integer.backend import Geometry, InputGrid, Weights
from tcaq.integer.cuda_triton import MIDDLE, Pixels, TritonConv, TritonLinear, TritonMatrix
from tcaq.integer.trial import LONGEST
from tcaq.numerics.bytes import byte_codes

from .places import GPU, HERE

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tcaq.integer import cuda_kernels


def awkward(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
    """Numbers in all sizes, and many halfway between codes."""
    x = torch.randn(shape) * 10.0 ** torch.randint(-6, 7, shape)
    halves = (torch.randint(-300, 300, shape) + 0.5) * scale
    return torch.where(torch.rand(shape) < 0.5, x, halves).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 70, 8, 4), (2, 128, 6, 5)], ids=str)
def test_codes_are_those_of_the_fake_quantizer(shape, last: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images, channels, height, width = shape
    gain, grid = torch.rand(channels) + 0.5, (0.11, 37, 201)
    gain[: channels // 2] = 1.0
    x = awkward(shape, grid[0], dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    matrix = TritonMatrix(torch.ones(4, 9, channels, dtype=torch.int8, device=HERE), Weights(x, torch.ones(4)))
    strides = (x.stride(0), x.stride(3), x.stride(1))
    here = InputGrid(grid[0], grid[1], gain.to(HERE), grid[2])
    codes = matrix.encode(x.to(HERE), Pixels(images, height, width, strides), here, 2, 1).cpu().int() + MIDDLE
    expected = byte_codes(x / (grid[0] * gain).reshape(1, -1, 1, 1), grid[1], grid[2]).int().permute(0, 2, 3, 1)
    filled = codes.shape[3]
    assert torch.equal(codes, pad(expected, (0, filled - channels, 1, 1, 2, 2), value=grid[1]))


def test_codes_of_tokens_are_those_of_the_fake_quantizer() -> None:
    torch.manual_seed(0)
    x, gain = awkward((2, 7, 70), 0.5, torch.float32), torch.rand(70) + 0.5
    scale, zero = torch.rand(2, 7, 1) + 0.1, torch.randint(0, 256, (2, 7, 1)).float()
    matrix = TritonMatrix(torch.ones(4, 1, 70, dtype=torch.int8, device=HERE), Weights(x, torch.ones(4)))
    grid = InputGrid(scale.to(HERE), zero.to(HERE), gain.to(HERE), 255)
    codes = matrix.encode(x.to(HERE), Pixels(2, 7, 1, (490, 70, 1)), grid).cpu().int() + MIDDLE
    expected = byte_codes(x / (scale * gain), zero, 255).int()
    assert torch.equal(codes[:, :, 0, :70], expected)
    assert torch.equal(codes[:, :, 0, 70:], zero.int().expand(2, 7, 58))


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")  # numpy's, in the interpreter
def test_numbers_too_large_to_divide_become_the_outer_codes() -> None:
    x = torch.tensor([[float("inf"), -float("inf"), -3e38, 3e38]])
    matrix = TritonMatrix(torch.ones(4, 1, 4, dtype=torch.int8, device=HERE), Weights(x, torch.ones(4)))
    grid = InputGrid(1e-3, 9, torch.ones(4, device=HERE), 15)
    codes = matrix.encode(x.to(HERE), Pixels(1, 1, 1, (4, 4, 1)), grid).flatten()[:4].int() + MIDDLE
    assert codes.tolist() == [15, 0, 0, 15]


GEOMETRIES = [
    (3, 3, Geometry(padding=(1, 1))),
    (3, 2, Geometry(stride=(2, 1), padding=(0, 2), dilation=(1, 2))),
    (1, 1, Geometry(stride=(1, 2))),
]


@pytest.mark.parametrize("size", cuda_kernels.SIZES, ids=str)
@pytest.mark.parametrize(
    "channels", [3, 48, 130, 256] if GPU else [3, 130], ids=lambda channels: f"{channels} channels"
)
@pytest.mark.parametrize(("rest", "last"), [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize(("rows", "columns", "geometry"), GEOMETRIES, ids=str)
def test_every_size_of_blocks_sums_exactly(
    size: tuple[int, ...], channels: int, rest: bool, last: bool, rows: int, columns: int, geometry: Geometry
) -> None:
    torch.manual_seed(0)
    out, zero = 67, 200
    weight, codes = torch.randint(-128, 128, (out, channels, rows, columns)), torch.randint(0, 256, (2, channels, 9, 8))
    more = torch.randint(-127, 128, (out,)) if rest else None
    given = Weights(
        weight.to(HERE, torch.int8), torch.ones(out, device=HERE), None, None if more is None else more.to(HERE).int()
    )
    kernel = TritonConv(given, geometry)
    m, n, warps, stages = size
    choice = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    expected = weight if more is None else weight + more.reshape(-1, 1, 1, 1)
    expected = conv2d(codes.double() - zero, expected.double(), None, *geometry.arguments)
    pixels = expected.numel() // out
    kernel.matrix._chosen[pixels.bit_length(), torch.float32] = choice
    x = (codes - zero).float().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = kernel(x.to(HERE), InputGrid(1.0, zero, torch.ones(channels, device=HERE), 255), torch.float32)
    assert list(kernel.matrix._chosen.values()) == [choice]
    assert torch.equal(found.cpu(), expected.float())


def test_the_largest_sums_fit() -> None:
    length = LONGEST if GPU else 1000  # the interpreter is slow
    codes = torch.full((17, length), 255.0)
    weight, rest = torch.full((16, length), 127, dtype=torch.int8), torch.full((16,), 128, dtype=torch.int32)
    kernel = TritonLinear(Weights(weight.to(HERE), torch.ones(16, device=HERE), None, rest.to(HERE)))
    for sign, zero in ((1, 0), (-1, 255)):
        grid = InputGrid(1.0, zero, torch.ones(length, device=HERE), 255)
        found = kernel((sign * codes).to(HERE), grid, torch.float32)
        assert torch.equal(found.cpu(), torch.full((17, 16), float(sign * 255 * 255 * length)))


@pytest.mark.parametrize(("shape", "out"), [((1, 1), 1), ((17,), 5), ((2, 3, 4, 33), 7)], ids=str)
def test_inputs_of_every_number_of_axes(shape: tuple[int, ...], out: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randint(-128, 128, (out, shape[-1])), torch.randint(-100, 100, shape)
    kernel = TritonLinear(Weights(weight.to(HERE, torch.int8), torch.ones(out, device=HERE)))
    found = kernel(x.float().to(HERE), InputGrid(1.0, 128, torch.ones(shape[-1], device=HERE), 255), torch.float32)
    assert torch.equal(found.long().cpu(), x @ weight.T)


@pytest.mark.parametrize("out", [1, 3, 32, 33, 128, 1280])
@pytest.mark.parametrize("total", [1, 100, 5000, 10**6])
def test_a_choice_of_blocks_is_left_for_every_shape(total: int, out: int) -> None:
    left = cuda_kernels.promising(cuda_kernels.tuned.configs, {"total": total, "out": out})
    sizes = [(config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]) for config in left]
    assert sizes
    assert all((n == 32) is (out <= 32) for _, n in sizes)
    assert not (total == 100 and len(sizes) > 1)
