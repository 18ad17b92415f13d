"""How a quantized denoiser describes itself in its diffusers `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from tcaq.errors import CheckpointError, UsageError
from tcaq.models.integrity import config_checksum
from tcaq.spec.conditions import Conditions
from tcaq.spec.plan import ResolvedPlan
from tcaq.spec.steps import StepGroups

FORMAT = 1
"""Version of the checkpoint format that is written; every version up to it is read."""


class QuantMethod(StrEnum):
    """The name under which diffusers finds the plug-in."""

    TCAQ = "tcaq"


@dataclass(kw_only=True)
class TcaqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Everything but the tensors that a quantized denoiser needs.

    Attributes: plan: a row for every layer; groups: timestep boundaries of the step groups; recipe: the recipe that made it, as
        JSON, for the record; step_bits: the activations' width in each step group, for the record, none where all have one; bypass:
        whether what the first layer cuts off goes around the denoiser; correction: channels of the noise correction behind the
        denoiser, 0 if there is none; dtype: name of the dtype of everything that is not quantized; checksum: of the
        JSON it was read from.
    """

    plan: ResolvedPlan
    groups: StepGroups
    recipe: Mapping[str, Any] = field(default_factory=dict)
    step_bits: tuple[int, ...] = ()
    bypass: bool = False
    correction: int = 0
    dtype: str = "float32"
    quant_method: QuantMethod = QuantMethod.TCAQ
    checksum: str = field(default="", compare=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it. Raises: CheckpointError if torch has no such floating-point dtype."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise CheckpointError(f"the checkpoint's dtype {self.dtype!r} is no floating-point dtype of torch")
        return dtype

    @property
    def calibration(self) -> Mapping[str, Any]:
        """The recipe's part about calibration; empty if the record has none."""
        found: Mapping[str, Any] = self.recipe.get("calibration", {})
        return found

    @property
    def conditions(self) -> Conditions | None:
        """What a conditional model was asked for in calibration; None for any other."""
        asked = self.calibration.get("conditions")
        return None if asked is None else Conditions(**asked)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, with the format version."""
        return {
            "quant_method": self.quant_method.value,
            "format": FORMAT,
            "dtype": self.dtype,
            "groups": self.groups.model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json", exclude_none=True),
            "recipe": deepcopy(dict(self.recipe)),
            **({"step_bits": list(self.step_bits)} if self.step_bits else {}),
            **({"bypass": True} if self.bypass else {}),
            **({"correction": self.correction} if self.correction else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: no field has a default that would be worth leaving out."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote. Raises: CheckpointError if the format is newer than this version understands, or damaged."""
        version = config_dict.get("format")
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {version!r}; this version of tcaq reads formats 1 to {FORMAT}. "
                "Upgrade tcaq, or quantize the model again with this version"
            )
        try:
            config = cls(
                plan=ResolvedPlan.parse(config_dict["plan"], where="plan"),
                groups=StepGroups.parse(config_dict["groups"], where="groups"),
                recipe=config_dict["recipe"],
                step_bits=tuple(config_dict.get("step_bits", ())),
                bypass=config_dict.get("bypass", False),
                correction=config_dict.get("correction", 0),
                dtype=config_dict["dtype"],
                checksum=config_checksum(config_dict),
            )
        except (KeyError, UsageError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"the checkpoint's quantization_config is damaged: {why}. Quantize the model again"
            ) from error
        return (config, kwargs) if return_unused_kwargs else config
