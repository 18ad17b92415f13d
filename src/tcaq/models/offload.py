"""Denoisers whose weights accelerate keeps elsewhere between calls."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils.modeling import get_state_dict_offloaded_model
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tcaq.errors import ModelError
from tcaq.models.denoiser import find_denoiser


def is_offloaded(module: nn.Module) -> bool:
    """Whether parts of a module have no data but while they run."""
    return any(tensor.is_meta for tensor in module.state_dict().values())


def devices_of(part: Any) -> set[str]:
    """The kinds of devices that hold a component's parameters; none for what is no module."""
    return {parameter.device.type for parameter in part.parameters()} if isinstance(part, nn.Module) else set()


def bring_back(pipe: DiffusionPipeline) -> None:
    """Put every weight of an offloaded denoiser on the CPU again, for good: calibration reads weights between calls.

    What moves a whole denoiser about (`enable_model_cpu_offload`) is no such thing, and stays.

    Raises: ModelError if weights were never loaded, or parts of the pipeline are on different devices or moved for each call.
    """
    places: dict[str, str] = {}
    for name, part in pipe.components.items():
        places |= dict.fromkeys(sorted(devices_of(part) - {"meta"}), name)
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None and torch.device(device).type != "cpu":
            raise ModelError(
                f"{name} is moved to {device} for each call, and calibration keeps its tensors in one place: quantize before the "
                "pipeline is offloaded, or after pipe.remove_all_hooks()"
            )
    if len(places) > 1:
        where = ", ".join(f"{name} on {place}" for place, name in places.items())
        raise ModelError(
            f"parts of the pipeline are on different devices ({where}); put all of it on one: pipe.to(...)"
        )
    denoiser = find_denoiser(pipe)[1]
    if not is_offloaded(denoiser):
        return
    remove_hook_from_module(denoiser, recurse=True)
    vars(denoiser).pop("hf_device_map", None)
    if is_offloaded(denoiser):
        raise ModelError(
            f"weights of the {type(denoiser).__name__} are on disk alone; load it without a device_map that puts them there"
        )


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, with the data of what is offloaded."""
    if not is_offloaded(module):
        return module.state_dict()
    return cast("dict[str, Tensor]", cast(Any, get_state_dict_offloaded_model)(module))
