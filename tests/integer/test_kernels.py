"""Kernels against whole numbers in float64, and the trial that finds out whether a processor is to be trusted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer import cpu, cuda, cuda_triton, trial
from tcaq.integer.backend import Geometry, InputGrid, Kernel, Span, Weights

from .places import EVERYWHERE, ON_GPU

GEOMETRIES = [
    ((8, 6, 3, 3), Geometry(padding=(1, 1))),
    ((8, 6, 3, 3), Geometry(stride=(2, 2), padding=(0, 1))),
    ((5, 7, 3, 1), Geometry(stride=(1, 2), padding=(2, 1), dilation=(2, 1))),
    ((16, 3, 1, 1), Geometry()),
]


def extremes(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    return torch.where(torch.rand(shape) < 0.5, low, high)


def run(kernel: Kernel, codes: Tensor, zero: int, device: str, scale: float = 1.0, dtype=torch.float32) -> Tensor:
    """What a kernel makes of the inputs that have these codes."""
    grid = InputGrid(scale, zero, torch.ones(codes.shape[1], device=device), 255)
    found = kernel(((codes - zero) * scale).to(device), grid, dtype)
    assert (found.device.type, found.dtype) == (device, dtype)
    return found.cpu()


def weights(codes: Tensor, device: str, scale: Tensor | None = None, bias: Tensor | None = None) -> Weights:
    scale = torch.ones(len(codes)) if scale is None else scale
    return Weights(codes.to(device, torch.int8), scale.to(device), None if bias is None else bias.to(device))


@EVERYWHERE
@pytest.mark.parametrize("zero", [0, 5, 255])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES, ids=str)
def test_a_convolution_sums_exactly(shape: tuple[int, ...], geometry: Geometry, zero: int, place) -> None:
    torch.manual_seed(0)
    backend, device = place
    weight, codes = extremes(shape, -16, 15), extremes((2, shape[1], 6, 7), 0, 255)
    scale, bias = torch.rand(shape[0]) + 0.5, torch.randn(shape[0])
    kernel = backend.conv(weights(weight, device, scale, bias), geometry)
    found = run(kernel, codes, zero, device, 0.25)
    sums = conv2d(codes.double() - zero, weight.double(), None, *geometry.arguments)
    expected = sums * (0.25 * scale.double()).reshape(1, -1, 1, 1) + bias.double().reshape(1, -1, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@EVERYWHERE
@pytest.mark.parametrize(("rows", "shape"), [(3, (5, 9)), (40, (16, 24))])
def test_a_matrix_product_sums_exactly(rows: int, shape: tuple[int, int], place) -> None:
    torch.manual_seed(0)
    backend, device = place
    weight, codes = extremes(shape, -16, 15), extremes((rows, shape[1]), 0, 255)
    kernel = backend.linear(weights(weight, device))
    assert torch.equal(run(kernel, codes, 7, device).double(), (codes.double() - 7) @ weight.double().T)
    run(kernel, codes, 7, device, dtype=torch.bfloat16)


@EVERYWHERE
def test_each_token_has_a_grid_of_its_own(place) -> None:
    torch.manual_seed(0)
    backend, device = place
    # processors without VNNI add two products in 16 bits, which those with bytes of 8 bits do not fit
    whole = backend.linear_problem((16, 24), Span(-128, 127, 255)) is None
    weight, codes = extremes((16, 24), *((-128, 127) if whole else (-64, 63))), torch.randint(0, 256, (2, 5, 24))
    scale, zero = torch.rand(2, 5, 1) + 0.5, torch.randint(0, 256, (2, 5, 1)).float()
    bias, gain = torch.randn(16), torch.rand(24) + 0.5
    x = (codes - zero) * (scale * gain)
    grid = InputGrid(scale.to(device), zero.to(device), gain.to(device), 255)
    found = backend.linear(weights(weight, device, bias=bias))(x.to(device), grid, torch.float32).cpu()
    expected = ((codes.double() - zero.double()) @ weight.double().T) * scale.double() + bias.double()
    assert found.shape == (2, 5, 16)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-2 if backend is cpu.CPU else 1e-4)


def clipped(codes: Tensor, weight: Tensor) -> Tensor:
    """What a processor without VNNI does: pairs of products are added in 16 bits and clipped."""
    products = codes.unsqueeze(1) * weight
    return products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)


@pytest.mark.parametrize(
    ("span", "fits"), [(Span(-128, 127, 255), False), (Span(-64, 63, 255), True), (Span(-128, 127, 127), True)]
)
def test_the_trial_finds_clipped_sums(span: Span, fits: bool) -> None:
    weight, codes = trial.extremes((6, 16), span.low, span.high), trial.extremes((8, 16), 0, span.top)

    def make(given: Weights):
        w = given.codes
        return lambda x, grid, dtype: (
            clipped(grid.codes(x, -1).int(), w.int()) - grid.zero_point * w.sum(1, dtype=torch.int32)
        ).to(dtype)

    problem = trial.compare(make, weight, codes, lambda zero: (codes.double() - zero) @ weight.double().T, span)
    assert (problem is None) is fits
    if not fits:
        assert f"weights {span.low} to {span.high} by codes 0 to {span.top}" in problem


def test_a_refusing_op_is_a_problem_with_its_words() -> None:
    def make(weights: Weights):
        raise RuntimeError("could not create a primitive")

    span = Span(-1, 1, 1)
    assert "could not create a primitive" in trial.compare(
        make, torch.ones(2, 2), torch.ones(2, 2), lambda zero: torch.ones(2, 2), span
    )


def test_ops_of_another_pytorch_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.missing() is None
    monkeypatch.setitem(cpu.ARGUMENTS, "qlinear_pointwise", ("qx", "something_new"))
    assert "takes other arguments" in cpu.missing()
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace())
    assert "has no op onednn::qconv_prepack" in cpu.missing()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in cpu.missing()


def test_the_matrix_product_of_a_gpu_gets_rows_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, orders = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: orders.append(a.is_contiguous()) or multiply(a, b))
    weight, codes = extremes((8, 16), -16, 15), extremes((16, 20), 0, 255).T
    found = run(cuda.CudaLinear(weights(weight, "cpu")), codes, 7, "cpu")
    assert orders == [True]
    assert torch.equal(found.double(), (codes.double() - 7) @ weight.double().T)


def test_a_gpu_takes_many_rows_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, sizes = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: sizes.append(len(a)) or multiply(a, b))
    monkeypatch.setattr(cuda, "MOST_ROWS", 40)
    weight, codes = extremes((8, 16), -16, 15), extremes((81, 16), 0, 255)
    found = run(cuda.CudaLinear(weights(weight, "cpu")), codes, 7, "cpu")
    assert sizes == [27, 27, 27]
    assert torch.equal(found.double(), (codes.double() - 7) @ weight.double().T)


@pytest.mark.parametrize(("kind", "shape"), [("conv", (8, 8, 3, 3)), ("linear", (8, 8))])
def test_a_shape_that_a_gpu_refuses_has_no_kernel_there(kind: str, shape: tuple[int, ...], monkeypatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    span = Span(-1, 0, 77)  # of no other test: trials are remembered
    problem = cuda.conv_problem(shape, Geometry(), span) if kind == "conv" else cuda.linear_problem(shape, span)
    assert "refused: CUBLAS_STATUS_NOT_SUPPORTED" in problem


def test_a_sum_that_may_not_fit_has_no_kernel_of_ours() -> None:
    problem = cuda_triton.conv_problem((8, 4096, 3, 3), Geometry(), Span(-128, 127, 255))
    assert problem == "sums of 36864 products may not fit 32 bits"
    assert cuda_triton.linear_problem((8, 33026), Span(-128, 127, 255)) == "sums of 33026 products may not fit 32 bits"


@ON_GPU
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "shape"), [(3, (5, 9)), (20, (16, 24)), (33, (12, 20))])
def test_a_matrix_product_on_a_gpu_is_that_of_float64(rows: int, shape: tuple[int, int], transposed: bool) -> None:
    weight = extremes(shape, -128, 127)
    codes = extremes((shape[1], rows), 0, 255).T if transposed else extremes((rows, shape[1]), 0, 255)
    found = run(cuda.CudaLinear(weights(weight, "cuda")), codes, 9, "cuda")
    assert torch.equal(found.double(), (codes.double() - 9) @ weight.double().T)
