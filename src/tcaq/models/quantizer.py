"""The plug-in with which diffusers saves and loads quantized denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from tcaq.errors import CheckpointError, PlanError, UsageError
from tcaq.layers.dequantize import dequantize_layers
from tcaq.layers.insert import insert, quantized_layers
from tcaq.layers.modes import Mode, moded
from tcaq.layers.weighted import QuantizedWeight
from tcaq.models.adapters import allow_fusing, check_unloaded, refuse_fusing
from tcaq.models.bypass import BYPASS, attach_bypass, bypass_of
from tcaq.models.config import QuantMethod, TcaqConfig
from tcaq.models.correction import CORRECTION, attach_correction, correction_of
from tcaq.models.denoiser import attach_clock
from tcaq.models.integrity import Seal, check_names


def register() -> None:
    """Make diffusers' `from_pretrained` and `save_pretrained` understand quantized denoisers; may be called again."""
    AUTO_QUANTIZER_MAPPING[QuantMethod.TCAQ.value] = TcaqQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.TCAQ.value] = TcaqConfig


def drop_float_weights(denoiser: nn.Module) -> None:
    """Leave every quantized layer with its packed codes alone."""
    for _, layer in quantized_layers(denoiser):
        if isinstance(layer, QuantizedWeight):
            layer.drop_float_weight()


def quantization_state(denoiser: nn.Module) -> dict[str, Tensor]:
    """Codes, scales and tables by full name: what must never be cast."""
    parts: list[tuple[str, nn.Module]] = list(quantized_layers(denoiser))
    if (bypass := bypass_of(denoiser)) is not None:
        parts.append((BYPASS, bypass))
    if (correction := correction_of(denoiser)) is not None:
        parts.append((CORRECTION, correction))
    return {f"{name}.{leaf}": buffer for name, part in parts for leaf, buffer in part.named_buffers()}


def _check_not_cast(tensors: Mapping[str, Tensor]) -> None:
    """Raises: UsageError if a scale has another dtype than float32, which no one could load."""
    parts = ("_quantizer.", ".equalizer", f"{BYPASS}.", f"{CORRECTION}.")
    ours = {name: tensor.dtype for name, tensor in tensors.items() if any(part in name for part in parts)}
    if cast := [name for name, dtype in ours.items() if dtype.is_floating_point and dtype != torch.float32]:
        raise UsageError(
            f"{cast[0]} and others were cast to {ours[cast[0]]}, and their digits are lost: load the checkpoint again, and ask "
            "for a dtype there (from_pretrained(..., torch_dtype=...))"
        )


class TcaqQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Called by diffusers while it loads or saves a denoiser.

    Loading is strict: it raises CheckpointError if a tensor is missing, unexpected, of another shape or dtype, or not the bytes
    that were saved.

    Attributes: has_codes: whether the denoiser still holds the codes that it was loaded with, to save, export or lower it.
    """

    requires_calibration = True
    has_codes = True
    quantization_config: TcaqConfig

    def __init__(self, quantization_config: TcaqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._seal = Seal()
        self._found: list[str] = []
        self._state: set[str] = set()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises: UsageError if a part would be offloaded to disk, where diffusers would cast its scales."""
        places = kwargs.get("device_map")
        if isinstance(places, dict) and "disk" in places.values():
            raise UsageError(
                "device_map puts a part of the quantized model on disk; give it memory on the CPU or another device"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype asked for, else the recorded one; saving again records it."""
        dtype = torch_dtype or self.quantization_config.torch_dtype
        self.quantization_config.dtype = str(dtype).removeprefix("torch.")
        return dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Look at the files before they are read."""
        self._found, self._seal = loaded_keys, Seal.read(checkpoint_files)
        self._seal.check_config(self.quantization_config.checksum)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check a file's tensors as they were read, before anything is cast."""
        self._seal.check_tensors(state_dict)
        return state_dict

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # the clock's buffers are not stored, so it is built with real ones; everything that is loaded is built on meta
        clock = attach_clock(model, self.quantization_config.groups)
        try:
            with torch.device("meta"):
                insert(model, self.quantization_config.plan, clock)
                if self.quantization_config.bypass:
                    attach_bypass(model)
                if self.quantization_config.correction:
                    attach_correction(model, self.quantization_config.correction)
        except PlanError as error:
            raise CheckpointError(f"the checkpoint's plan does not fit its model: {error}") from error
        drop_float_weights(model)
        self._state = set(quantization_state(model))
        check_names(self._found, list(model.state_dict()))
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Whether a tensor is quantization state."""
        return param_name in self._state

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Raises: CheckpointError if a tensor has another shape than the plan asks for."""
        if current_param.shape != loaded_param.shape:
            raise CheckpointError(
                f"{param_name} has shape {list(loaded_param.shape)}, the plan asks for {list(current_param.shape)}"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a tensor in its place as it was stored: `param_value` was cast to the model's dtype already."""
        parent, _, leaf = param_name.rpartition(".")
        module, stored = model.get_submodule(parent), state_dict[param_name]
        asked = module.get_buffer(leaf)
        if stored.dtype != asked.dtype:
            raise CheckpointError(f"{param_name} has dtype {stored.dtype}, the plan asks for {asked.dtype}")
        setattr(module, leaf, stored.to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # a shard may lack what its index promises
        empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        check_names([], empty)
        refuse_fusing(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is saved. Raises: UsageError if a pickle is asked for, adapters are loaded, or scales were cast."""
        if not safe_serialization:
            raise UsageError("a quantized model is saved as safetensors only; leave out safe_serialization=False")
        check_unloaded(state_dict)
        _check_not_cast(state_dict)
        return state_dict, Seal.of(state_dict, self.quantization_config.to_dict()).metadata()

    def _dequantize(self, model: Any) -> Any:
        """Plain layers again, with the quantized weights' values; the clock stays, and nothing asks it any more."""
        dequantize_layers(model, self.quantization_config.torch_dtype)
        for part in moded(model):
            part.mode = Mode.FLOAT  # what was measured on quantized inputs no longer holds
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        del model.quantization_method
        allow_fusing(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """torch.compile gives one graph for all step groups."""
        return True
