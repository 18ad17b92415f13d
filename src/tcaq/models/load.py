"""Find the model that a user named: a local diffusers directory or a Hub id."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError, safe_open
from torch import nn

from tcaq.errors import MissingExtraError, ModelError, NumericalError, TcaqError
from tcaq.models.config import QuantMethod, TcaqConfig
from tcaq.models.denoiser import COMPONENTS
from tcaq.models.offload import state_of

FULL_PRECISION = ("DDIMPipeline", "DDPMPipeline", "LDMPipeline")
"""Pipelines that draw their noise, or put out their images, in float32 alone."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What diffusers raises over files that are damaged, missing, or of another version."""


def load_pipeline(model: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """Load a pipeline from a local diffusers directory or, by its id, from the Hub.

    Args: dtype: None: that of the denoiser's file, so that a large model does not take twice the memory of its file.
    Raises: ModelError saying what was looked for and what to do; MissingExtraError if its text encoder needs one.
    """
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ModelError(f"{model!r} exists but is no diffusers pipeline directory: it has no model_index.json")
    try:
        place = folder if folder.exists() else Path(DiffusionPipeline.download(model))
        pipe = cast(DiffusionPipeline, DiffusionPipeline.from_pretrained(model, dtype=dtype or stored_dtype(place)))
    except TcaqError:
        raise
    except ImportError as error:
        raise missing_extra(error) from error
    except UNREADABLE as error:
        tried = "a local directory" if folder.exists() else f"a local directory (there is none) and an id at {ENDPOINT}"
        raise ModelError(
            f"cannot load {model!r}, tried as {tried}: {error}. Check the name and the connection, or give the directory of a "
            f"downloaded pipeline{_variants(folder)}"
        ) from error
    _check_complete(pipe)
    return pipe


def _variants(folder: Path) -> str:
    """A hint, if a folder's denoiser is there in variants alone."""
    files = [path for name in COMPONENTS for path in (folder / name).glob("*.safetensors")]
    names = {path.name.removesuffix(".safetensors").partition(".")[2] for path in files}
    if not names or "" in names:
        return ""
    return (
        f". Its files are those of the variant {min(names)!r}: load it in Python with variant={min(names)!r}, save it with "
        "save_pretrained, and give that directory"
    )


def _check_complete(pipe: DiffusionPipeline) -> None:
    """Raises: ModelError naming weights that no file had; diffusers warns of them and goes on."""
    for name, part in pipe.components.items():
        state = part.state_dict() if isinstance(part, nn.Module) else {}
        if missing := [key for key, tensor in state.items() if tensor.is_meta]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"the files of {name} lack {missing[0]}{more}: download or copy the model again")


def missing_extra(error: ImportError) -> TcaqError:
    """What is not installed, and how to install it."""
    return MissingExtraError("transformers", "transformers") if "transformers" in str(error) else ModelError(str(error))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of a denoiser on disk if it is half precision and its pipeline runs in it, else float32; checkpoints record it."""
    for path in (folder / name / "config.json" for name in COMPONENTS):
        config = json.loads(path.read_text()).get("quantization_config") if path.is_file() else None
        if config and config.get("quant_method") == QuantMethod.TCAQ.value:
            return cast(TcaqConfig, TcaqConfig.from_dict(config)).torch_dtype
    index = json.loads((folder / "model_index.json").read_text())
    if index.get("_class_name") in FULL_PRECISION:
        return torch.float32
    names = set[str]()
    for file in (path for name in COMPONENTS for path in (folder / name).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
    return (
        {"F16": torch.float16, "BF16": torch.bfloat16}.get(names.pop(), torch.float32)
        if len(names) == 1
        else torch.float32
    )


def weights_hash(module: nn.Module) -> str:
    """Hash of all parameters and buffers, names included; equal for equal weights on any machine.

    Raises: NumericalError naming the first tensor that is not finite.
    """
    digest = sha256()
    for name, tensor in sorted(state_of(module).items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"the model's weight {name!r} holds NaN or infinity; it cannot be quantized")
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
