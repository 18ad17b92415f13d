from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DDIMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tcaq.errors import CheckpointError, UsageError
from tcaq.layers.insert import quantized_layers
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.config import FORMAT, TcaqConfig
from tcaq.models.quantizer import TcaqQuantizer, quantization_state, register
from tcaq.spec.steps import StepGroups

WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMESTEPS = (900, 500, 10)  # one in each step group

register()


@torch.no_grad()
def outputs(unet: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    x = x.to(next(unet.parameters()).dtype)
    return [unet(x, torch.tensor(t)).sample for t in TIMESTEPS]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def pipe(tiny_pipeline: Callable[..., Any], quantized_tiny: Callable[..., Any]) -> DDIMPipeline:
    return quantized_tiny(tiny_pipeline())


@pytest.fixture(scope="module")
def folder(pipe: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized")
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def unet_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the denoiser's folder that a test may damage."""
    for file in (folder / "unet").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], *, seal: bool = True) -> None:
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata=metadata if seal else {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def test_step_groups_matter(pipe: DDIMPipeline) -> None:
    shifted = copy.deepcopy(pipe.unet)
    shifted.step_clock.groups = StepGroups(boundaries=(600.0, 2000.0))  # 900 moves from the last group to the second
    before, after = outputs(pipe.unet), outputs(shifted)
    assert not torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])


@pytest.mark.parametrize(
    "load",
    [
        lambda path: DDIMPipeline.from_pretrained(path).unet,
        lambda path: DiffusionPipeline.from_pretrained(path).unet,
        lambda path: DiffusionPipeline.from_pretrained(path, device_map="cpu").unet,
        lambda path: UNet2DModel.from_pretrained(path, subfolder="unet"),
        lambda path: UNet2DModel.from_pretrained(path, subfolder="unet", device_map="cpu"),
        lambda path: AutoModel.from_pretrained(str(path), subfolder="unet"),
    ],
    ids=["DDIMPipeline", "DiffusionPipeline", "pipeline-device-map", "UNet2DModel", "model-device-map", "AutoModel"],
)
def test_every_way_to_load_gives_equal_outputs(
    pipe: DDIMPipeline, folder: Path, load: Callable[[Path], nn.Module]
) -> None:
    loaded = load(folder)
    assert_same(outputs(loaded), outputs(pipe.unet))
    assert isinstance(loaded.hf_quantizer, TcaqQuantizer)
    assert loaded.is_quantized


def test_config_survives(pipe: DDIMPipeline, folder: Path) -> None:
    loaded = UNet2DModel.from_pretrained(folder, subfolder="unet").config.quantization_config
    saved: TcaqConfig = pipe.unet.config.quantization_config
    assert loaded == saved
    assert (loaded.plan, loaded.groups, loaded.recipe, loaded.dtype) == (
        saved.plan, saved.groups, {"program": "random", "seed": 1}, "float32",
    )  # fmt: skip
    assert json.loads(json.dumps(saved.to_diff_dict())) == saved.to_dict()


def test_saving_again_gives_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    UNet2DModel.from_pretrained(folder, subfolder="unet").save_pretrained(tmp_path)
    contents = []
    for file in (tmp_path / WEIGHTS, folder / "unet" / WEIGHTS):
        with safe_open(file, framework="pt") as opened:
            contents.append((opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}))  # noqa: SIM118
    (again_meta, again), (first_meta, first) = contents
    assert again_meta == first_meta  # safetensors shuffles its order, so the files themselves need not be equal
    assert again.keys() == first.keys()
    assert all(again[name].dtype == t.dtype and torch.equal(again[name], t) for name, t in first.items())


def test_stored_tensors_are_the_integers_of_the_plan(pipe: DDIMPipeline, folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    for name, layer in quantized_layers(pipe.unet):
        if isinstance(layer, QuantizedWeight):
            codes, bits = tensors[f"{name}.weight_quantizer.codes"], layer.weight_quantizer.grid.bits
            assert codes.dtype == torch.uint8
            assert codes.numel() == -(-layer.weight_quantizer.shape.numel() * bits // 8)
            assert f"{name}.weight" not in tensors


def test_shards(pipe: DDIMPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    assert_same(outputs(DDIMPipeline.from_pretrained(tmp_path).unet), outputs(pipe.unet))


def test_shard_of_another_save_is_refused(pipe: DDIMPipeline, tmp_path: Path) -> None:
    unet = copy.deepcopy(pipe.unet)
    for name in ("one", "other"):
        unet.save_pretrained(tmp_path / name, max_shard_size="40KB")
        unet.conv_in.input_quantizer.scale.mul_(2)
    shard = sorted((tmp_path / "one").glob("*.safetensors"))[1]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(CheckpointError, match=r"not saved together"):
        UNet2DModel.from_pretrained(tmp_path / "one")


def test_bfloat16_casts_only_what_is_not_quantized(pipe: DDIMPipeline, folder: Path, tmp_path: Path) -> None:
    half = UNet2DModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.bfloat16)
    state, full = quantization_state(half), quantization_state(pipe.unet)
    assert state.keys() == full.keys()
    assert all(torch.equal(state[name], full[name]) and state[name].dtype == full[name].dtype for name in full)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (_, a), (_, b) in zip(quantized_layers(half), quantized_layers(pipe.unet), strict=True):
        if isinstance(a, QuantizedWeight) and isinstance(b, QuantizedWeight):
            assert torch.equal(a.quantized_weight(torch.bfloat16), b.quantized_weight(torch.float32).bfloat16())
    for a, b in zip(outputs(half), outputs(pipe.unet), strict=True):
        assert a.dtype == torch.bfloat16
        # a rounding of bfloat16 may move an activation to the next code, so single values differ by more
        assert (a.float() - b).norm() < 0.2 * b.norm()
    half.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert_same(outputs(again), outputs(half))


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.double])
def test_a_model_whose_scales_were_cast_is_not_saved(
    pipe: DDIMPipeline, tmp_path: Path, cast: Callable[[nn.Module], Any]
) -> None:
    with pytest.raises(UsageError, match=r"were cast to torch\.(bfloat16|float64).*torch_dtype"):
        cast(copy.deepcopy(pipe.unet)).save_pretrained(tmp_path)


def test_copies_can_be_pickled(pipe: DDIMPipeline) -> None:
    expected = outputs(pipe.unet)
    twin = pickle.loads(pickle.dumps(pipe.unet))
    pipe.unet.step_clock.set(900)
    assert_same(outputs(twin), expected)
    assert twin.conv_in.input_quantizer.clock is twin.step_clock


def test_copies_have_a_clock_of_their_own(pipe: DDIMPipeline) -> None:
    twin = copy.deepcopy(pipe.unet)
    expected = outputs(pipe.unet)
    pipe.unet.step_clock.set(900)
    assert_same(outputs(twin), expected)
    assert int(twin.step_clock.group) != int(pipe.unet.step_clock.group)


@pytest.mark.timeout(900)
def test_compiles_to_one_graph_for_all_step_groups(
    tiny_pipeline: Callable[..., Any], quantized_tiny: Callable[..., Any]
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    unet = quantized_tiny(tiny_pipeline(channels=(8,), attention=0)).unet
    expected = outputs(unet)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    graphs = []
    with torch.no_grad():
        for t, sample in zip(TIMESTEPS, expected, strict=True):
            torch.testing.assert_close(compiled(x, torch.tensor(t)).sample, sample, rtol=0, atol=1e-5)
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]
    torch._dynamo.reset()


def test_dequantize_gives_a_plain_model(pipe: DDIMPipeline, folder: Path, tmp_path: Path) -> None:
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet").dequantize()
    assert {type(m) for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {nn.Conv2d, nn.Linear}
    for name, layer in quantized_layers(pipe.unet):
        if isinstance(layer, QuantizedWeight):
            assert torch.equal(unet.get_submodule(name).weight, layer.quantized_weight(torch.float32))
    unet.save_pretrained(tmp_path)
    plain = UNet2DModel.from_pretrained(tmp_path)
    assert not hasattr(plain, "hf_quantizer")
    assert plain.state_dict().keys() == UNet2DModel.from_config(plain.config).state_dict().keys()
    assert_same(outputs(plain), outputs(unet))


CODES = "mid_block.resnets.0.conv1.weight_quantizer.codes"
SCALE = "mid_block.resnets.0.conv1.input_quantizer.scale"


def flip(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(torch.uint8)[3] ^= 16


@pytest.mark.parametrize("name", [CODES, SCALE, "conv_norm_out.bias"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, name: tensors.pop(name), "missing: {}"),
        (lambda tensors, name: tensors.update({name + "_more": tensors[name].clone()}), "unexpected: {}_more"),
        (flip, "{}: damaged"),
    ],
    ids=["missing", "unexpected", "flipped"],
)
def test_wrong_tensors_are_named(
    unet_folder: Path, name: str, change: Callable[[dict[str, Tensor], str], object], says: str
) -> None:
    rewrite(unet_folder, lambda tensors: change(tensors, name))
    with pytest.raises(CheckpointError, match=says.format(name.replace(".", r"\."))):
        UNet2DModel.from_pretrained(unet_folder)


def test_rewritten_without_checksums_is_refused(unet_folder: Path) -> None:
    rewrite(unet_folder, lambda tensors: None, seal=False)
    with pytest.raises(CheckpointError, match="no checksum is stored"):
        UNet2DModel.from_pretrained(unet_folder)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [(SCALE, torch.ones(7), r"shape \[7\].*\[3\]"), (CODES, torch.float32, r"float32.*uint8")],
    ids=["shape", "dtype"],
)
def test_wrong_shape_or_dtype_is_named(pipe: DDIMPipeline, tmp_path: Path, name: str, changed: Any, says: str) -> None:
    unet = copy.deepcopy(pipe.unet)
    parent, _, leaf = name.rpartition(".")
    module = unet.get_submodule(parent)
    value = changed if isinstance(changed, Tensor) else getattr(module, leaf).to(changed)
    setattr(module, leaf, value)
    unet.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " has .*" + says):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(format=FORMAT + 1), f"format {FORMAT + 1}.*reads formats 1 to {FORMAT}"),
        (lambda c: c.pop("format"), "format None"),
        (lambda c: c.pop("plan"), "'plan' is missing"),
        (lambda c: c["groups"].update(boundaries=[5, 4]), "boundaries must ascend"),
        (lambda c: c["groups"].update(boundaries=[300.0, 600.0]), "config.json: damaged"),
    ],
    ids=["newer", "no-format", "no-plan", "invalid", "altered"],
)
def test_wrong_configs_are_refused(unet_folder: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    edit_config(unet_folder, change)
    with pytest.raises(CheckpointError, match=says):
        UNet2DModel.from_pretrained(unet_folder)


def test_never_a_pickle(pipe: DDIMPipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="safetensors only"):
        pipe.unet.save_pretrained(tmp_path, safe_serialization=False)


def test_a_float_model_cannot_be_quantized_while_it_loads(
    tiny_pipeline: Callable[..., Any], pipe: DDIMPipeline, tmp_path: Path
) -> None:
    tiny_pipeline().unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=pipe.unet.config.quantization_config)


def test_offload_to_disk_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="on disk"):
        UNet2DModel.from_pretrained(folder, subfolder="unet", device_map={"": "disk"})


def test_registering_twice_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert AUTO_QUANTIZER_MAPPING["tcaq"] is TcaqQuantizer
