"""A whole pipeline, fake against integer, and everything that must not break it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tcaq
from tcaq.errors import ModelError, UsageError
from tcaq.integer import cpu
from tcaq.integer.backend import Backend
from tcaq.integer.layer import IntegerLayer
from tcaq.integer.lower import BACKENDS
from tcaq.integer.product import IntegerProduct
from tcaq.layers.insert import quantized_layers
from tcaq.layers.product import QuantizedProduct
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.bypass import attach_bypass
from tcaq.models.correction import attach_correction
from tcaq.models.load import weights_hash
from tcaq.models.sampler import sample

MAPS = Path("/proc/self/maps")


@torch.no_grad()
def output(unet: nn.Module, when: float | Tensor = 500.0) -> Tensor:
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    return unet(x, torch.as_tensor(when)).sample


@pytest.fixture
def make(tiny_pipeline, quantized_tiny):
    return lambda **options: quantized_tiny(tiny_pipeline(), **options)


@pytest.mark.skipif(not MAPS.exists(), reason="the system does not list what is mapped")
def test_nothing_of_the_checkpoint_file_stays_in_memory(make, tmp_path):
    tcaq.save(make(), tmp_path)
    pipe = tcaq.load(tmp_path)
    assert str(tmp_path) in MAPS.read_text()
    tcaq.lower(pipe)
    assert str(tmp_path) not in MAPS.read_text()


def test_every_layer_on_even_grids_runs_in_integers_and_the_rest_says_why(make):
    pipe = make()
    planned = dict(quantized_layers(pipe.unet))
    mixes = [layer for name, layer in planned.items() if name.endswith("mix")]
    for mix in mixes:
        mix.left_quantizer.use_log2.fill_(False)
    mixes[0].left_quantizer.use_log2[1] = True
    lowering = tcaq.lower(pipe)
    assert [row.name for row in lowering.layers] == list(planned)
    assert [row.execution for row in lowering.layers] == [
        "fake" if layer is mixes[0] else "integer" for layer in planned.values()
    ]
    for name, layer in planned.items():
        kind = IntegerLayer if isinstance(layer, QuantizedWeight) else IntegerProduct
        assert isinstance(pipe.unet.get_submodule(name), kind)
    (kept,) = lowering.kept
    assert kept.reason == "probabilities on a log2 grid are no whole numbers, as they are in 1 of 3 step groups"
    assert f"{len(planned) - 1} of {len(planned)} quantized layers" in lowering.summary()
    assert kept.name in lowering.summary()


OPTIONS = [{}, {"weights": 8, "activations": 8}, {"weights": 3, "activations": 4}]
TIMES = [10.0, torch.tensor([10, 990, 400])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("when", TIMES, ids=str)
def test_each_layer_equals_its_fake_one_on_what_it_meets_in_the_model(make, options, when):
    pipe, met = make(**options), {}

    def remember(name):
        return lambda layer, args, result: met.update({name: (layer, args[0], result)})

    for name, layer in quantized_layers(pipe.unet):
        if isinstance(layer, QuantizedWeight):
            layer.register_forward_hook(remember(name))
    output(pipe.unet, when)
    tcaq.lower(pipe)
    for name, (layer, x, expected) in met.items():
        with torch.no_grad():
            found = pipe.unet.get_submodule(name)(x)
            sizes = abs(layer.quantized_input(x)), abs(layer.quantized_weight(torch.float32))
            conv = isinstance(layer, nn.Conv2d)
            bound = layer._conv_forward(*sizes, None) if conv else torch.nn.functional.linear(*sizes)
        assert found.shape == expected.shape
        assert (abs(found - expected) <= 1e-6 * (bound + 1)).all(), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("when", TIMES, ids=str)
def test_predictions_differ_by_rounding_where_no_code_tips_over(make, options, when):
    # where rounding tips a value over the edge of a code, what follows differs by a step: not so for most
    pipe = make(**options)
    fake = output(pipe.unet, when)
    tcaq.lower(pipe)
    difference = (output(pipe.unet, when) - fake).abs()
    assert difference.median() <= 1e-5 * fake.std()
    assert difference.square().mean() <= 0.05 * fake.var()


def test_images_are_those_of_the_fake_pipeline(make):
    pipe = make(weights=8)
    fake = sample(pipe, [1, 2, 3], 2).short()
    tcaq.lower(pipe)
    difference = (sample(pipe, [1, 2, 3], 2).short() - fake).abs()
    assert fake.float().std() > 10
    assert (difference <= 1).double().mean() > 0.95


def test_the_noise_correction_stays_in_force(make):
    pipe = make(weights=8)
    attach_correction(pipe.unet, 1).set_rows(torch.full((3,), 0.5), torch.zeros(3, 1))
    tcaq.lower(pipe)
    corrected = output(pipe.unet)
    pipe.unet.noise_correction.set_rows(torch.zeros(3), torch.zeros(3, 1))
    torch.testing.assert_close(output(pipe.unet), corrected * 1.5)


def test_the_bypass_stays_in_force(make):
    pipe = make(weights=8)
    bypass, limit = attach_bypass(pipe.unet), torch.full((3,), 0.5)
    bypass.set_rows(-limit, limit, torch.tensor([1.0, 2.0, 3.0]))
    tcaq.lower(pipe)
    whole = output(pipe.unet)  # t = 500 is in the middle one of three groups
    bypass.gain.zero_()
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(whole - output(pipe.unet), 2 * (x - x.clamp(-0.5, 0.5)), rtol=1e-4, atol=1e-4)


def tensors_of(kernel) -> list[Tensor]:
    """All that a kernel holds, what its parts hold included."""
    parts = list(vars(kernel).values())
    own = [part for part in parts if type(part).__module__.startswith("tcaq.") and hasattr(part, "__dict__")]
    return [part for part in parts if isinstance(part, Tensor)] + [more for part in own for more in tensors_of(part)]


def test_no_copy_of_a_weight_stays_but_the_packed_one(make):
    pipe = make()
    counts = {
        name: layer.weight_quantizer.shape.numel()
        for name, layer in quantized_layers(pipe.unet)
        if isinstance(layer, QuantizedWeight)
    }
    largest = max(counts.values())
    tcaq.lower(pipe)
    for name, count in counts.items():
        large = [part for part in tensors_of(pipe.unet.get_submodule(name)._kernel) if part.numel() >= count]
        assert len(large) == 1, name
        assert large[0].is_mkldnn or large[0].dtype == torch.int8, name
    held = [part for module in pipe.unet.modules() for part in vars(module).values() if isinstance(part, Tensor)]
    state = list(pipe.unet.state_dict().values())
    assert max(part.numel() for part in held + state) < largest
    assert not any("codes" in name for name in pipe.unet.state_dict())


def test_fused_attention_is_an_option_and_is_said(make):
    pipe = make()
    quantized = output(pipe.unet)
    lowering = tcaq.lower(pipe, products="fused")
    assert {(row.execution, row.reason) for row in lowering.kept} == {
        ("float", "asked for: attention in one fused float operation")
    }
    assert not any(isinstance(module, QuantizedProduct) for module in pipe.unet.modules())
    assert not torch.equal(output(pipe.unet), quantized)


def test_without_the_ops_it_runs_fake_with_one_warning(make, monkeypatch):
    pipe = make()
    before = output(pipe.unet)
    monkeypatch.setitem(cpu.ARGUMENTS, "qconv_prepack", ("of", "another", "version"))
    with pytest.warns(
        RuntimeWarning, match="onednn::qconv_prepack takes other arguments.*runs fake-quantized"
    ) as caught:
        lowering = tcaq.lower(pipe)
    assert len(caught) == 1
    assert {row.execution for row in lowering.layers} == {"fake"}
    assert torch.equal(output(pipe.unet), before)
    monkeypatch.undo()
    assert len(tcaq.lower(pipe).kept) < len(lowering.layers)


def test_a_device_without_kernels_runs_fake_with_one_warning(make, monkeypatch):
    monkeypatch.delitem(BACKENDS, "cpu")
    with pytest.warns(RuntimeWarning, match="no integer kernels for 'cpu'"):
        assert all(row.execution == "fake" for row in tcaq.lower(make()).layers)


def test_a_layer_that_is_not_exact_stays_fake_and_equal(make, monkeypatch):
    pipe = make()
    before = output(pipe.unet)
    backend = Backend(cpu.missing, cpu.CpuConv, cpu.CpuLinear, lambda *_: "it clips", lambda *_: "it clips")
    monkeypatch.setitem(BACKENDS, "cpu", (backend,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowering = tcaq.lower(pipe)
    assert {row.reason for row in lowering.kept} == {"it clips", "products of two activations have no integer kernel"}
    assert torch.equal(output(pipe.unet), before)


def test_a_layer_takes_the_first_backend_that_runs_it_exactly(make, monkeypatch):
    def wide(shape, *_):
        return "too few rows" if shape[0] < 4 else None

    class Own(cpu.CpuConv):
        pass

    first = cpu.Backend(cpu.missing, Own, cpu.CpuLinear, wide, wide)
    absent = cpu.Backend(lambda: "not here", Own, cpu.CpuLinear, wide, wide)
    pipe = make(weights=4)
    expected = make(weights=4)
    tcaq.lower(expected, compiled=False)
    monkeypatch.setitem(BACKENDS, "cpu", (absent, first, cpu.CPU))
    lowering = tcaq.lower(pipe)
    assert all("log2" in row.reason for row in lowering.kept)
    assert torch.equal(output(pipe.unet), output(expected.unet))
    assert type(pipe.unet.conv_in._kernel) is Own
    assert type(pipe.unet.conv_out._kernel) is cpu.CpuConv


def test_what_is_not_quantized_is_refused(tiny_pipeline, make):
    with pytest.raises(UsageError, match="is not quantized"):
        tcaq.lower(tiny_pipeline())


@pytest.mark.parametrize("products", ["plan", "fused"])
def test_a_lowered_pipeline_is_not_lowered_again_or_exported(make, products, tmp_path):
    pipe = make()
    tcaq.lower(pipe, products=products)
    with pytest.raises(UsageError, match="lowered already"):
        tcaq.lower(pipe)
    for write in (tcaq.export_onnx, tcaq.export_openvino):
        with pytest.raises(ModelError, match=r"was lowered; export what tcaq\.load gives"):
            write(pipe, tmp_path / "out")


def test_a_lowered_pipeline_is_not_saved(make, tmp_path):
    pipe = make()
    before = weights_hash(pipe.unet)
    tcaq.lower(pipe)
    assert weights_hash(pipe.unet) != before
    with pytest.raises(UsageError, match="no codes to save"):
        pipe.unet.save_pretrained(tmp_path)
