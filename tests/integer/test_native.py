"""Compiled C between integer kernels: against PyTorch and float64, and what happens where nothing can be compiled."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.functional import conv2d

import tcaq
from tcaq.integer.backend import Geometry, InputGrid, eager_log2, signed_codes
from tcaq.integer.layer import IntegerConv2d
from tcaq.integer.native import compiler, library
from tcaq.integer.native.compiler import CompilerError, compiled
from tcaq.integer.native.kernels import COMPILED
from tcaq.integer.native.library import NativeGlue, native_glue
from tcaq.integer.normed import NormedSilu

from .places import THREADS

COMPILER = (shlex.split(os.environ.get("CC", "")) or ["cc"])[0]
WITH_COMPILER = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C compiler")
IMAGES = [(2, 24, 9, 7), (1, 3, 1, 1), (3, 130, 20, 16), (1, 512, 4, 4)]


def image(*shape: int, spread: float = 3.0) -> Tensor:
    x = spread * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def grid_for(channels: int, before: NormedSilu | None = None, top: int = 255) -> InputGrid:
    equalizer = torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.5
    return InputGrid(9 / top, top // 3, equalizer, top, before=before)


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize("top", [3, 15, 255])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_codes_are_pytorchs_to_the_bit(shape: tuple[int, ...], top: int, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    x, grid = image(*shape), grid_for(shape[1], top=top)
    x[0, 0, 0, 0] = 1e30
    given = x.clone()
    codes, sums = native_glue().encode(x, grid, 1, summed=True)
    expected = grid.codes(x, 1)
    assert torch.equal(codes, expected)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sums, expected.sum(1, dtype=torch.int32))
    assert torch.equal(x, given)
    if shape[1] > 3:
        assert codes.unique().numel() > top / 2


@WITH_COMPILER
def test_halves_go_to_the_even_code_as_in_pytorch() -> None:
    x = torch.arange(-4.5, 5.0, 1.0).reshape(1, -1)
    codes, _ = native_glue().encode(x, InputGrid(1.0, 100, torch.ones(x.shape[1]), 255), -1)
    assert codes.flatten().tolist() == [96, 96, 98, 98, 100, 100, 102, 102, 104, 104]


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (3, 132, 20, 16), (1, 512, 4, 4), (1, 8, 1, 3)], ids=str)
def test_codes_behind_a_norm_are_those_of_float64(
    shape: tuple[int, ...], added: bool, threads: int, threads_after
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, shape[1], eps=1e-3)
    nn.init.normal_(norm.weight, 1.0)
    nn.init.normal_(norm.bias)
    before = NormedSilu(norm, torch.randn(shape[:2]) if added else None)
    x, grid = image(*shape) + 2, grid_for(shape[1], before)
    codes, sums = native_glue().encode(x, grid, 1, summed=True)
    y = x.double() + (before.added.double()[:, :, None, None] if added else 0)
    y = nn.functional.silu(nn.functional.group_norm(y, 4, norm.weight.double(), norm.bias.double(), norm.eps))
    units = y / (grid.scale * grid.equalizer.double()).reshape(1, -1, 1, 1)
    exact = (units.round() + grid.zero_point).clamp(0, grid.top)
    near_an_edge = (units - units.floor() - 0.5).abs() < 1e-4
    assert ((codes == exact) | near_an_edge).all()
    assert ((codes - exact).abs() <= 1).all()
    assert near_an_edge.double().mean() < 0.01
    assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


# how many times its standard deviation a group's mean is away from zero
DISTANCES = torch.tensor([1.0, -30.0, 1000.0, -10_000.0])


@WITH_COMPILER
@torch.no_grad()
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 9, 7), (1, 8, 151, 173)], ids=["small", "its last part of pixels is empty"])
def test_groups_far_from_zero_are_normed_as_well_as_pytorch_does(shape: tuple[int, ...], added: bool) -> None:
    torch.manual_seed(0)
    groups, each = len(DISTANCES), shape[1] // len(DISTANCES)
    norm = nn.GroupNorm(groups, shape[1])
    nn.init.normal_(norm.weight, 1.0, 0.2)
    x = image(*shape) + 3 * DISTANCES.repeat_interleave(each).reshape(1, -1, 1, 1)
    before = NormedSilu(norm, torch.randn(shape[:2]) if added else None)
    more = before.added[:, :, None, None] if added else torch.zeros(1)
    exact = nn.functional.silu(copy.deepcopy(norm).double()(x.double() + more.double()))
    # where channels lie apart: beside each other, PyTorch loses far groups' variances itself
    pytorchs = (nn.functional.silu(norm((x + more).contiguous())) - exact).abs()
    allowed = 2 * pytorchs.unflatten(1, (groups, each)).amax((0, 2, 3, 4)).repeat_interleave(each) + 2.0**-20
    found = differences(x, exact, before, units=(allowed / 4).float())
    assert (found <= 1.25 * allowed.reshape(1, -1, 1, 1)).all()


def differences(x: Tensor, exact: Tensor, before: NormedSilu, units: Tensor) -> Tensor:
    """How far what codes stand for is from `exact`, float64, by codes so fine that a byte holds only the lowest digits of each.

    Args: units: float32 [channels], what a code is worth; codes stay below 2^24, where floats hold them.
    """
    codes, _ = native_glue().encode(x, InputGrid(1.0, 2**20, units, 2**24, before=before), 1)
    steps = units.double().reshape(1, -1, 1, 1)
    expected = exact / steps + 2**20
    assert 0 < expected.min() < expected.max() < 2**24
    return ((codes - expected + 128).remainder(256) - 128).abs() * steps


@WITH_COMPILER
def test_silu_far_out_neither_overflows_nor_ends() -> None:
    norm = nn.GroupNorm(1, 4)
    norm.weight.data.fill_(0)
    norm.bias.data.copy_(torch.tensor([-1e4, -100.0, 100.0, 1e4]))
    codes, _ = native_glue().encode(
        image(1, 4, 2, 2), InputGrid(1.0, 5, torch.ones(4), 200, before=NormedSilu(norm)), 1
    )
    assert codes[0, :, 0, 0].tolist() == [5, 5, 105, 200]


@WITH_COMPILER
def test_what_it_does_not_take_goes_pytorchs_way() -> None:
    glue, grid = native_glue(), grid_for(6)
    for x in (torch.randn(2, 6, 5, 4), image(2, 6, 5, 4).bfloat16(), image(2, 6, 5, 8)[..., ::2]):
        assert not glue.takes(x, 1)
        codes, sums = glue.encode(x, grid, 1, summed=True)
        assert torch.equal(codes, grid.codes(x, 1))
        assert torch.equal(sums, codes.sum(1, dtype=torch.int32))


GEOMETRIES = [
    ((3, 3), Geometry(padding=(1, 1))),
    ((3, 3), Geometry(stride=(2, 2), padding=(0, 1))),
    ((3, 1), Geometry(stride=(1, 2), padding=(2, 1), dilation=(2, 1))),
    ((1, 1), Geometry()),
]


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize(("kernel", "geometry"), GEOMETRIES, ids=str)
def test_windows_add_what_a_convolution_with_constants_does(
    kernel: tuple[int, int], geometry: Geometry, threads: int, threads_after
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    codes, factors, absent = torch.randint(0, 256, (3, 6, 20, 18)), torch.randn(30), 6 * 77
    weight = factors.double().reshape(-1, 1, 1, 1).expand(-1, 6, *kernel)
    constants = conv2d(codes.double() - 77, weight, None, *geometry.arguments)
    x = image(*constants.shape)
    expected = x.double() + constants
    native_glue().add_windows(x, codes.sum(1, dtype=torch.int32), factors, absent, kernel, geometry)
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=1e-3)


@WITH_COMPILER
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2)], ids=str)
def test_signed_codes_lie_as_the_operand_does(order: tuple[int, ...]) -> None:
    x = image(2, 3, 40, 30).contiguous().permute(order)
    found = native_glue().signed(x, 0.1, -20, -128, 100)
    assert torch.equal(found, signed_codes(x, 0.1, -20, -128, 100))
    assert (found.dtype, found.stride()) == (torch.int8, x.stride())
    gaps = x[..., ::2]
    assert torch.equal(native_glue().signed(gaps, 0.1, 3, -8, 7), signed_codes(gaps, 0.1, 3, -8, 7))


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize(("bits", "per_octave"), [(2, 1), (4, 1), (4, 2), (8, 1), (8, 16)])
def test_a_log2_grid_is_pytorchs(bits: int, per_octave: int, threads: int, threads_after) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    p = torch.softmax(8 * torch.randn(2, 3, 50, 70), dim=-1)
    p[0, 0, 0, :5] = torch.tensor([0.0, 1.0, 0.3, 1e-44, 1e-37])
    given, peak = p.clone(), 0.3
    found, expected = native_glue().fake_log2(p, peak, bits, per_octave), eager_log2(p, peak, bits, per_octave)
    units = -per_octave * (p.double() / peak).log2()
    near_an_edge = (units - units.floor() - 0.5).abs() < 1e-5 * (1 + units.abs())
    assert ((found == expected) | near_an_edge | (p < 1e-37)).all()
    assert near_an_edge.double().mean() < 0.01
    assert (found[p < 1e-38] == 0).all()
    assert found[0, 0, 0, 1] == torch.tensor(peak)
    assert expected.unique().numel() > bits
    assert torch.equal(p, given)


@WITH_COMPILER
@torch.no_grad()
def test_blocks_run_their_norms_in_it(tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    pipe, expected = (quantized_tiny(tiny_pipeline(), weights=8, activations=8) for _ in range(2))
    assert not tcaq.lower(pipe).missing
    tcaq.lower(expected, compiled=False)
    met: list[InputGrid] = []
    encode = NativeGlue.encode
    monkeypatch.setattr(
        NativeGlue,
        "encode",
        lambda self, x, grid, *more, **options: met.append(grid) or encode(self, x, grid, *more, **options),
    )
    pairs = list(zip(pipe.unet.modules(), expected.unet.modules(), strict=True))
    blocks = [pair for pair in pairs if isinstance(pair[0], ResnetBlock2D)]
    torch.manual_seed(0)
    for block, other in blocks:
        x, time = image(3, block.in_channels, 8, 8), torch.randn(3, block.time_emb_proj.in_features)
        met.clear()
        found, wanted = block(x, time), other(x, time)
        assert [type(grid.before) for grid in met if grid.before] == [NormedSilu] * 2
        assert met[-1 - (block.conv_shortcut is not None)].before.added is not None
        # a code may tip over its edge, which moves an output by a step of the grid at most
        off = (found - wanted).abs()
        assert off.median() < 1e-5 * wanted.abs().mean()
        assert off.max() < 0.1 * wanted.std()
    assert blocks


@WITH_COMPILER
def test_samples_in_several_step_groups_are_normed_before_they_part(tiny_pipeline, quantized_tiny) -> None:
    pipe, expected = (quantized_tiny(tiny_pipeline(), weights=8, activations=8) for _ in range(2))
    tcaq.lower(pipe)
    tcaq.lower(expected, compiled=False)
    x, times = image(3, 1, 16, 16, spread=1.0), torch.tensor([10, 990, 400])
    with torch.no_grad():
        found, wanted = pipe.unet(x, times).sample, expected.unet(x, times).sample
    assert (found - wanted).abs().median() < 1e-4 * wanted.std()


@WITH_COMPILER
def test_a_lowered_layer_can_be_copied(tiny_pipeline, quantized_tiny) -> None:
    glue = native_glue()
    assert copy.deepcopy(glue) is glue
    assert pickle.loads(pickle.dumps(glue)) is glue


@WITH_COMPILER
def test_a_library_is_made_once_for_a_compiler_and_a_source(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = compiled(library.SOURCE)
    made = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "cache" / "tcaq"
    assert compiled(library.SOURCE) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    other = tmp_path / library.SOURCE.name
    other.write_text(library.SOURCE.read_text() + "\n/* changed */\n")
    assert compiled(other) != first
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DOTHER"))
    assert compiled(library.SOURCE) != first


def test_without_a_compiler_pytorch_does_it_and_the_summary_says_so(tiny_pipeline, quantized_tiny, monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native_glue.cache_clear()
    try:
        lowering = tcaq.lower(pipe := quantized_tiny(tiny_pipeline()))
    finally:
        native_glue.cache_clear()
    assert lowering.missing == ("no C compiler was found (no-such-compiler; the variable CC names another)",)
    assert f"faster kernels are missing: {lowering.missing[0]}" in lowering.summary()
    assert any(isinstance(layer, IntegerConv2d) for layer in pipe.unet.modules())


@WITH_COMPILER
def test_what_cannot_be_compiled_or_loaded_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "glue.c"
    monkeypatch.setattr(library, "SOURCE", source)
    source.write_text("this is no C")
    with pytest.raises(CompilerError, match=f"the C compiler {re.escape(COMPILER)} failed: "):
        native_glue.__wrapped__()
    source.write_text("int nothing;")
    compiled(source).write_bytes(b"half a library")
    with pytest.raises(CompilerError, match=r"cannot be loaded: .*\.so"):
        native_glue.__wrapped__()


@WITH_COMPILER
def test_a_library_that_rounds_otherwise_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "glue.c"
    source.write_text(library.SOURCE.read_text().replace("rintf(units)", "floorf(units)"))
    monkeypatch.setattr(library, "SOURCE", source)
    with pytest.raises(CompilerError, match="other numbers than PyTorch"):
        native_glue.__wrapped__()


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tcaq").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(CompilerError, match=r"cannot be kept|no C compiler"):
        compiled(library.SOURCE)


def test_it_can_be_turned_off(tiny_pipeline, quantized_tiny) -> None:
    pipe = quantized_tiny(tiny_pipeline())
    assert tcaq.lower(pipe, compiled=False).missing == ()
    kernels = {type(layer._kernel) for layer in pipe.unet.modules() if isinstance(layer, IntegerConv2d)}
    assert kernels
    assert COMPILED.conv not in kernels


def scores_of(kind: str) -> torch.Tensor:
    """Scores of attention, float [2, 3, 50, 70]."""
    scores = 4 * torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    if kind == "masked":
        scores[..., 40:] = -torch.inf
        scores[:, 0, :, 5] = torch.finfo(torch.float32).min
    return scores + 1000 if kind == "far off" else scores


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize("kind", ["plain", "masked", "far off"])
@pytest.mark.parametrize(("low", "high"), [(0, 15), (-128, 127)])
def test_codes_of_a_softmax_are_pytorchs_but_for_halves(low, high, kind, threads, threads_after) -> None:
    torch.set_num_threads(threads)
    scores, scale = scores_of(kind), 0.9 / (high - low)
    found = native_glue().softmax_signed(scores, scale, low, low, high)
    units = torch.softmax(scores.double(), dim=-1) / scale
    near_an_edge = (units - units.floor() - 0.5).abs() < 1e-5 * (1 + units)
    expected = (units.round() + low).clamp(low, high)
    assert found.dtype == torch.int8
    assert ((found == expected) | near_an_edge).all()
    assert near_an_edge.double().mean() < 0.01
    assert expected.unique().numel() > 10
    turned = scores_of("plain").mT  # rows that do not lie beside each other
    assert torch.equal(
        native_glue().softmax_signed(turned, scale, low, low, high),
        signed_codes(torch.softmax(turned, dim=-1), scale, low, low, high),
    )


@WITH_COMPILER
@THREADS
@pytest.mark.parametrize("kind", ["plain", "masked", "far off"])
@pytest.mark.parametrize(("bits", "per_octave"), [(2, 1), (4, 1), (4, 2), (6, 4), (8, 1), (8, 16)])
def test_powers_of_a_softmax_are_pytorchs_but_for_halves(bits, per_octave, kind, threads, threads_after) -> None:
    torch.set_num_threads(threads)
    scores, peak = scores_of(kind), 0.7
    found = native_glue().softmax_log2(scores.clone(), peak, bits, per_octave)
    p = torch.softmax(scores.double(), dim=-1)
    expected = eager_log2(p.float(), peak, bits, per_octave)
    units = -per_octave * (p / peak).log2()
    near_an_edge = (units - units.floor() - 0.5).abs() < 1e-5 * (1 + units.abs())
    alike = (found - expected).abs() <= 2.5e-7 * expected  # two digits of the last place
    assert (alike | near_an_edge | (p < 1e-37)).all()
    assert (found[p < 1e-38] == 0).all()
    assert near_an_edge.double().mean() < 0.01
    turned = scores_of("plain").mT
    assert torch.equal(
        native_glue().softmax_log2(turned, peak, bits, per_octave),
        native_glue().fake_log2(torch.softmax(turned, dim=-1), peak, bits, per_octave),
    )
