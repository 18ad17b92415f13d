"""ONNX Runtime and OpenVINO against the fake model: layer by layer, end to end, and an exported folder's whole life."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tcaq
from tcaq.errors import CheckpointError, MissingExtraError, UsageError
from tcaq.export import onnx, openvino
from tcaq.export.example import Example
from tcaq.export.folder import CARD
from tcaq.export.interface import Input, Interface
from tcaq.export.parity import parity
from tcaq.export.probability import probability_stand_in
from tcaq.export.product import PowersStandIn, ProductStandIn
from tcaq.export.standin import Dialect, Steps
from tcaq.export.traceable import stand_in
from tcaq.layers.product import QuantizedProduct
from tcaq.models.sampler import sample
from tcaq.processor import has_vnni
from tcaq.quantizers.clock import StepClock
from tcaq.quantizers.probability import ProbabilityQuantizer
from tcaq.recipes.quantize import quantize
from tcaq.spec.grid import AdaptiveGrid, AffineGrid, UnitGrid
from tcaq.spec.plan import LayerGrids
from tcaq.spec.steps import StepGroups
from tests.integer.test_layers import bound, quantized, spread_widths
from tests.recipes.test_related import small

FORMATS = ("onnx", "openvino")
WRITE = {"onnx": tcaq.export_onnx, "openvino": tcaq.export_openvino}
READ = {"onnx": tcaq.load_onnx, "openvino": tcaq.load_openvino}
PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    for package in PACKAGES[request.param]:
        pytest.importorskip(package)
    return request.param


@pytest.fixture(scope="module")
def pipe(tiny_pipeline, quantized_tiny):
    return quantized_tiny(tiny_pipeline(channels=(8, 16)))


@pytest.fixture(scope="module")
def folder(form, pipe, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp(form) / "exported"
    WRITE[form](pipe, target)
    return target


class OneLayer(nn.Module):
    """A layer as a model of its own, at a timestep."""

    def __init__(self, layer: nn.Module, dialect: Dialect) -> None:
        super().__init__()
        self.steps = (Steps(layer.input_quantizer.clock.boundaries),)
        self.layer = stand_in(layer, dialect, self.steps[0])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.steps[0].set(timestep)
        return self.layer(sample)


def run_layer(form: str, layer: nn.Module, x: Tensor, path: Path, vnni: bool):
    """Predictions of a layer in the other runtime, as a function of the timestep."""
    module = onnx if form == "onnx" else openvino
    dialect = onnx.OnnxDialect(vnni) if form == "onnx" else openvino.OpenVinoDialect(vnni)
    free = {0: "batch"} | ({2: "height", 3: "width"} if x.dim() == 4 else {})
    interface = Interface(("sample", "timestep"), (Input("sample", "float32", free), Input("timestep", "float32", {})))
    module.write_traced(OneLayer(layer, dialect).eval(), Example(interface, (x, torch.zeros(1))), path)
    predict = module.open_onnx(path) if form == "onnx" else module.open_openvino(path)
    return lambda time, x=x: torch.from_numpy(predict(x.numpy(), np.array([time], dtype=np.float32)))


class OneProduct(nn.Module):
    """A product as a model of its own, at a timestep."""

    def __init__(self, product: nn.Module, steps: Steps) -> None:
        super().__init__()
        self.product, self.steps = product, (steps,)

    def forward(self, sample: Tensor, timestep: Tensor, other: Tensor) -> Tensor:
        self.steps[0].set(timestep)
        return self.product(sample, other, scale=0.5)


def run_product(kind: type, product: QuantizedProduct, p: Tensor, v: Tensor, path: Path, vnni: bool):
    """Halved products in ONNX Runtime, as a function of p, the timestep and v."""
    steps, names = Steps(product.right_quantizer.clock.boundaries), ("sample", "timestep", "other")
    free = {"sample": {2: "rows", 3: "inner"}, "timestep": {}, "other": {2: "inner"}}
    interface = Interface(names, tuple(Input(name, "float32", free[name]) for name in names))
    traced = OneProduct(kind(product, onnx.OnnxDialect(vnni), steps), steps)
    onnx.write_traced(traced.eval(), Example(interface, (p, torch.zeros(1), v)), path)
    predict = onnx.open_onnx(path)
    return lambda p, time, v=v: torch.from_numpy(predict(p.numpy(), np.array([time], dtype=np.float32), v.numpy()))


MIXED = AffineGrid(bits=3, wider=(8,))


@pytest.mark.parametrize(
    ("weight", "inputs"), [(4, AffineGrid(bits=4)), (8, AffineGrid(bits=8)), (4, MIXED)], ids=["4-4", "8-8", "mixed"]
)
@pytest.mark.parametrize("plain", [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Linear(6, 8)], ids=["conv", "linear"])
@pytest.mark.parametrize("vnni", [False, True], ids=["anywhere", "vnni"])
def test_each_kind_of_layer_equals_its_fake_one(form, plain, weight, inputs, vnni, tmp_path) -> None:
    if vnni and not has_vnni():
        pytest.skip("this processor has no VNNI instructions, without which sums are clipped")
    torch.manual_seed(0)
    layer = quantized(plain, AffineGrid(bits=weight), inputs)
    if inputs.wider:
        spread_widths(layer, inputs)
    x = torch.randn(3, 6, 9, 10) if isinstance(plain, nn.Conv2d) else torch.randn(3, 5, 6, 6)
    found = run_layer(form, layer, x, tmp_path / {"onnx": "layer.onnx", "openvino": "layer.xml"}[form], vnni)
    for time in (10.0, 900.0):
        layer.input_quantizer.clock.set(time)
        with torch.no_grad():
            off = (found(time) - layer(x)).abs() > bound(layer, x) * 10
        assert off.double().mean() < 0.02  # where a quotient lies on the edge between two codes


@torch.no_grad()
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2}, {"padding": (2, 0), "dilation": 2}], ids=str)
def test_windows_in_parts_are_those_of_the_whole(geometry, tmp_path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(6, 8, 3, **geometry), AffineGrid(bits=4), AffineGrid(bits=4))
    whole = run_layer("onnx", layer, torch.randn(3, 6, 9, 10), tmp_path / "whole.onnx", False)
    monkeypatch.setattr("tcaq.export.windows.PART", 500)
    parts = run_layer("onnx", layer, torch.randn(3, 6, 9, 10), tmp_path / "parts.onnx", False)
    assert len((tmp_path / "parts.onnx").read_bytes()) > len((tmp_path / "whole.onnx").read_bytes())
    for batch, height, width in ((3, 9, 10), (1, 14, 7)):
        x = torch.randn(batch, 6, height, width)
        for time in (10.0, 900.0):
            assert torch.equal(whole(time, x), parts(time, x))


@torch.no_grad()
@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize(
    "left", [AffineGrid(bits=8), UnitGrid(bits=8), UnitGrid(bits=4)], ids=["scores", "mix", "mix-4"]
)
def test_products_of_codes_equal_their_fake_ones(left, vnni, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    if vnni and not has_vnni():
        pytest.skip("this processor has no VNNI instructions, without which sums are clipped")
    torch.manual_seed(0)
    clock = StepClock(StepGroups(boundaries=(500.0,)))
    product = QuantizedProduct(LayerGrids(name="product", kind="mix", inputs=(left, AffineGrid(bits=8))), clock)
    p, v = torch.rand(2, 3, 9, 11), torch.randn(2, 3, 11, 5)
    product.right_quantizer.set_rows(torch.tensor([0.02, 0.03]), torch.tensor([120.0, 97.0]))
    if isinstance(left, AffineGrid):
        product.left_quantizer.set_rows(torch.tensor([0.005, 0.004]), torch.tensor([3.0, 70.0]))
    found = run_product(ProductStandIn, product, p, v, tmp_path / "product.onnx", vnni)
    for time in (10.0, 900.0):
        clock.set(time)
        torch.testing.assert_close(found(p, time), product(p, v, scale=0.5), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("vnni", [False, True], ids=["anywhere", "vnni"])
@pytest.mark.parametrize("chosen", [(True, True), (True, False)], ids=["log2", "both"])
@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_of_powers_of_two_equal_their_fake_ones(bits, per_octave, chosen, vnni, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    if vnni and not has_vnni():
        pytest.skip("this processor has no VNNI instructions, without which sums are clipped")
    clock, draw = StepClock(StepGroups(boundaries=(500.0,))), torch.Generator().manual_seed(0)
    grid = AdaptiveGrid(bits=bits, per_octave=per_octave)
    product = QuantizedProduct(LayerGrids(name="product", kind="mix", inputs=(grid, AffineGrid(bits=8))), clock)
    product.right_quantizer.set_rows(torch.tensor([0.02, 0.03]), torch.tensor([120.0, 97.0]))
    peaks, scales = torch.tensor([0.9, 0.37]), torch.tensor([0.05, 0.06])
    product.left_quantizer.set_rows(scales, peaks, torch.tensor(chosen))
    p, v = torch.rand(2, 3, 9, 11), torch.randn(2, 3, 11, 5, generator=draw)
    found = run_product(PowersStandIn, product, p, v, tmp_path / "product.onnx", vnni)
    nodes = [node.op_type for node in pytest.importorskip("onnx").load(tmp_path / "product.onnx").graph.node]
    # one product of bytes where the highest power fits a byte and nothing lies between two powers
    assert nodes.count("MatMulIntegerToFloat") == (1 if per_octave == 1 and bits < 4 else 2)
    codes = torch.arange(-2, 2**bits + 8).repeat(3)  # above the peak, every value of the grid, and below the last
    for group, time in enumerate((10.0, 900.0)):
        beside = codes + 0.98 * (torch.rand(2, 3, 9, len(codes), generator=draw) - 0.5)  # never on the edge of a code
        p = peaks[group] * torch.exp2(-beside / per_octave) if chosen[group] else scales[group] * beside.clamp(min=0)
        p[:, :, 0] = 0.0
        v = torch.randn(2, 3, len(codes), 5, generator=draw)
        clock.set(time)
        left, right = (quantizer(x).double() for quantizer, x in zip(product.operands.values(), (p, v), strict=True))
        assert len(left.unique()) == 2**bits
        torch.testing.assert_close(found(p, time, v), (left @ right * 0.5).float(), rtol=1e-5, atol=1e-5)


class Attended(nn.Module):
    """Quantized probabilities, and the probabilities, of scores at a timestep."""

    def __init__(self, quantizer: ProbabilityQuantizer) -> None:
        super().__init__()
        self.steps = (Steps(quantizer.clock.boundaries),)
        self.quantizer = probability_stand_in(quantizer, self.steps[0])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.steps[0].set(timestep)
        p = torch.softmax(sample, -1)
        return torch.stack([self.quantizer(p), p])


@torch.no_grad()
@pytest.mark.parametrize("chosen", [(True, True), (True, False)], ids=["log2", "both"])
@pytest.mark.parametrize("per_octave", [1, 2])
def test_runtimes_leave_the_rounding_to_powers_of_two_as_it_is(form, per_octave, chosen, tmp_path) -> None:
    draw = torch.Generator().manual_seed(0)
    grid = AdaptiveGrid(bits=4, per_octave=per_octave)
    quantizer = ProbabilityQuantizer(grid, StepClock(StepGroups(boundaries=(500.0,))))
    quantizer.set_rows(torch.tensor([0.05, 0.06]), torch.tensor([0.9, 0.37]), torch.tensor(chosen))
    scores = torch.randn(2, 3, 64, 48, generator=draw) * torch.linspace(0.1, 8, 64).reshape(-1, 1)
    interface = Interface(
        ("sample", "timestep"), (Input("sample", "float32", {0: "rows"}), Input("timestep", "float32", {}))
    )
    module, path = (onnx, tmp_path / "p.onnx") if form == "onnx" else (openvino, tmp_path / "p.xml")
    module.write_traced(Attended(quantizer).eval(), Example(interface, (scores, torch.zeros(1))), path)
    predict = module.open_onnx(path) if form == "onnx" else module.open_openvino(path)
    for time in (10.0, 900.0):
        quantizer.clock.set(time)
        found, p = torch.from_numpy(predict(scores.numpy(), np.array([time], dtype=np.float32)))
        expected = quantizer(p)
        assert len(expected.unique()) > 8
        off = (found - expected).abs() > 1e-5 * expected
        assert off.double().mean() < 1e-3  # on the edge between two codes


@torch.no_grad()
def test_a_model_whose_widths_change_by_step_predicts_as_in_pytorch(form, tiny_pipeline, tmp_path) -> None:
    recipe = small("minmax", step_groups="per-step", mixed={"bits": [4, 8]})
    pipe = quantize(tiny_pipeline(channels=(8, 16)), recipe)
    assert set(pipe.unet.config.quantization_config.step_bits) == {4, 8}
    WRITE[form](pipe, tmp_path / "exported")
    exported, x = READ[form](tmp_path / "exported"), torch.randn(3, 1, 16, 16)
    for when in (0.0, 999.0):  # the widest and the narrowest
        expected, found = (p.unet(x, when).sample for p in (pipe, exported))
        assert (found - expected).abs().median() <= 0.05 * expected.std()
        assert (found - expected).square().mean() <= 0.05 * expected.var()


@pytest.mark.parametrize("shape", [(3, 1, 24, 16)], ids=str)
@pytest.mark.parametrize("when", [500.0, torch.tensor(10)], ids=str)
def test_predictions_are_those_of_the_fake_model_at_any_size(folder, form, pipe, shape, when) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = (p.unet(x, when).sample for p in (pipe, READ[form](folder)))
    difference = (found - expected).abs()
    assert found.shape == expected.shape
    assert difference.median() <= 0.05 * expected.std()
    assert difference.square().mean() <= 0.05 * expected.var()


def test_openvino_is_told_the_precision_between_integers(folder, form, pipe, monkeypatch) -> None:
    if form != "openvino":
        pytest.skip("an option of OpenVINO alone")
    import openvino as package

    hints, compiling = [], package.Core.compile_model

    def remember(core, path, device, options):
        hints.append(options["INFERENCE_PRECISION_HINT"])
        return compiling(core, path, device, options)

    monkeypatch.setattr(package.Core, "compile_model", remember)
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    outputs = [read(folder).unet(x, 500.0).sample for read in (tcaq.load_openvino, half)]
    assert hints == ["f32", "bf16"]
    assert (outputs[0] - outputs[1]).abs().median() <= 0.1 * outputs[0].std()


def half(folder: Path):
    return tcaq.load_openvino(folder, precision="bf16")


def test_a_batch_with_several_timesteps_is_run_one_by_one(folder, form, pipe) -> None:
    x, when = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([990, 10, 400])
    exported = READ[form](folder).unet
    together = exported(x, when, return_dict=False)[0]
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], exported(x[i : i + 1], when[i]).sample, rtol=1e-4, atol=1e-4)


def test_images_come_from_the_same_pipeline_class(folder, form, pipe) -> None:
    exported = READ[form](folder)
    assert type(exported) is type(pipe)
    found, expected = sample(exported, [1, 2], 2).float(), sample(pipe, [1, 2], 2).float()
    assert expected.std() > 10
    assert (found - expected).abs().median() <= 3
    assert parity(pipe, exported) > 15
    assert parity(pipe, pipe) > 200


def test_weights_are_stored_in_bytes(folder, form, pipe) -> None:
    count = sum(
        layer.weight_quantizer.shape.numel() for layer in pipe.unet.modules() if hasattr(layer, "weight_quantizer")
    )
    if form == "openvino":
        assert (folder / "unet" / "model.bin").stat().st_size < 2 * count
        return
    import onnx as package

    stored = package.load(folder / "unet" / "model.onnx").graph.initializer
    kinds = (package.TensorProto.INT8, package.TensorProto.UINT8)
    integers = sum(int(np.prod(t.dims)) for t in stored if t.data_type in kinds)
    floats = max(int(np.prod(t.dims)) for t in stored if t.data_type == package.TensorProto.FLOAT)
    assert integers >= count
    assert floats <= 256  # tables and vectors, no matrix


def test_a_damaged_or_foreign_folder_is_refused(folder, form, tmp_path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="holds no export"):
        READ[form](tmp_path)
    with pytest.raises(UsageError, match="is not empty and holds no export"):
        WRITE[form](None, Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        WRITE[form](None, ".")
    card = json.loads((folder / CARD).read_text())
    file = folder / "unet" / sorted(card["sha256"])[0]
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-7])
        with pytest.raises(CheckpointError, match=rf"{file.name} is missing or damaged"):
            READ[form](folder)
    finally:
        file.write_bytes(whole)
    (folder / CARD).write_text(json.dumps(card | {"vnni": True}))
    monkeypatch.setattr("tcaq.export.folder.has_vnni", lambda: False)
    try:
        with pytest.raises(CheckpointError, match="exported with --vnni, and this processor has no VNNI"):
            READ[form](folder)
    finally:
        (folder / CARD).write_text(json.dumps(card))
    other = next(name for name in FORMATS if name != form)
    if all(package in sys.modules for package in PACKAGES[other]):
        with pytest.raises(CheckpointError, match=f"holds an export to '{form}', not to '{other}'"):
            READ[other](folder)


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra_is_named(name, package, pipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'tcaq\[{name}\]'"):
        WRITE[name](pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
