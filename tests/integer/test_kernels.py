"""Kernels against whole numbers in float64, and the trial that finds out whether a processor is to be trusted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tcaq.integer import cpu, cuda, trial
from tcaq.integer.backend import Backend, Geometry, Span

GEOMETRIES = [
    ((8, 6, 3, 3), Geometry(padding=(1, 1))),
    ((8, 6, 3, 3), Geometry(stride=(2, 2), padding=(0, 1))),
    ((5, 7, 3, 1), Geometry(stride=(1, 2), padding=(2, 1), dilation=(2, 1))),
    ((16, 3, 1, 1), Geometry()),
]
BACKENDS = [pytest.param(cpu.CPU, id="cpu"), pytest.param(cuda.CUDA, id="cuda's arithmetic on the CPU")]


def extremes(shape: tuple[int, ...], low: int, high: int) -> Tensor:
    return torch.where(torch.rand(shape) < 0.5, low, high)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [0, 5, 255])
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES, ids=str)
def test_a_convolution_sums_exactly(shape: tuple[int, ...], geometry: Geometry, zero: int, backend: Backend) -> None:
    torch.manual_seed(0)
    weight, codes = extremes(shape, -16, 15), extremes((2, shape[1], 6, 7), 0, 255)
    scale, bias = torch.rand(shape[0]) + 0.5, torch.randn(shape[0])
    kernel = backend.conv(weight.to(torch.int8), scale, bias, geometry)
    found = kernel(codes.to(torch.uint8), 0.25, zero, torch.float32)
    sums = conv2d(codes.double() - zero, weight.double(), None, *geometry.arguments)
    expected = sums * (0.25 * scale.double()).reshape(1, -1, 1, 1) + bias.double().reshape(1, -1, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "shape"), [(3, (5, 9)), (40, (16, 24))])
def test_a_matrix_product_sums_exactly(rows: int, shape: tuple[int, int], backend: Backend) -> None:
    torch.manual_seed(0)
    weight, codes = extremes(shape, -16, 15), extremes((rows, shape[1]), 0, 255)
    kernel = backend.linear(weight.to(torch.int8), torch.ones(shape[0]), None)
    found = kernel(codes.to(torch.uint8), 1.0, 7, torch.float32)
    assert torch.equal(found.double(), (codes.double() - 7) @ weight.double().T)
    assert kernel(codes.to(torch.uint8), 1.0, 7, torch.bfloat16).dtype == torch.bfloat16


def clipped(codes: Tensor, weight: Tensor) -> Tensor:
    """What a processor without VNNI does: pairs of products are added in 16 bits and clipped."""
    products = codes.unsqueeze(1) * weight
    return products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)


@pytest.mark.parametrize(
    ("span", "fits"), [(Span(-128, 127, 255), False), (Span(-64, 63, 255), True), (Span(-128, 127, 127), True)]
)
def test_the_trial_finds_clipped_sums(span: Span, fits: bool) -> None:
    weight, codes = trial.extremes((6, 16), span.low, span.high), trial.extremes((8, 16), 0, span.top)

    def make(w: Tensor, scale: Tensor):
        return lambda q, scale, zero, dtype: (clipped(q.int(), w.int()) - zero * w.sum(1, dtype=torch.int32)).to(dtype)

    problem = trial.compare(make, weight, codes, lambda zero: (codes.double() - zero) @ weight.double().T, span)
    assert (problem is None) is fits
    if not fits:
        assert f"weights {span.low} to {span.high} by codes 0 to {span.top}" in problem


def test_a_refusing_op_is_a_problem_with_its_words() -> None:
    def make(weight: Tensor, scale: Tensor):
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
    found = cuda.CudaLinear(weight.to(torch.int8), torch.ones(8), None)(codes.to(torch.uint8), 1.0, 7, torch.float32)
    assert orders == [True]
    assert torch.equal(found.double(), (codes.double() - 7) @ weight.double().T)


@pytest.mark.parametrize(("kind", "shape"), [("conv", (8, 8, 3, 3)), ("linear", (8, 8))])
def test_a_shape_that_a_gpu_refuses_has_no_kernel_there(kind: str, shape: tuple[int, ...], monkeypatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    span = Span(-1, 0, 77)  # of no other test: trials are remembered
    problem = cuda.conv_problem(shape, Geometry(), span) if kind == "conv" else cuda.linear_problem(shape, span)
    assert "refused: CUBLAS_STATUS_NOT_SUPPORTED" in problem


ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the same arithmetic is tested on the CPU above"
)


@ON_GPU
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "shape"), [(3, (5, 9)), (20, (16, 24)), (33, (12, 20))])
def test_a_matrix_product_on_a_gpu_is_that_of_float64(rows: int, shape: tuple[int, int], transposed: bool) -> None:
    weight = extremes(shape, -128, 127)
    codes = extremes((shape[1], rows), 0, 255).T if transposed else extremes((rows, shape[1]), 0, 255)
    kernel = cuda.CudaLinear(weight.to(torch.int8).cuda(), torch.ones(shape[0]).cuda(), None)
    found = kernel(codes.to(torch.uint8).cuda(), 1.0, 9, torch.float32)
    assert torch.equal(found.double().cpu(), (codes.double() - 9) @ weight.double().T)


@ON_GPU
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES, ids=str)
def test_a_convolution_on_a_gpu_is_that_of_float64(shape: tuple[int, ...], geometry: Geometry) -> None:
    assert cuda.missing() is None
    weight, codes = extremes(shape, -128, 127), extremes((2, shape[1], 6, 7), 0, 255)
    kernel = cuda.CudaConv(weight.to(torch.int8).cuda(), torch.ones(shape[0]).cuda(), None, geometry)
    found = kernel(codes.to(torch.uint8).cuda(), 1.0, 9, torch.float32)
    assert torch.equal(found.double().cpu(), conv2d(codes.double() - 9, weight.double(), None, *geometry.arguments))
