"""What an exported denoiser is called with: its inputs by name, and which of their axes stay free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIMESTEP = "timestep"
BATCH = "batch"
"""The name of the axis that has a row for each sample."""
DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class Input:
    """One input of the graph.

    Attributes: name: the path of the denoiser's argument, as `added_cond_kwargs.time_ids`; dtype: a key of `DTYPES`; free: names of
        its free axes by number; axes of one name have one size; the others have the size they were traced with.
    """

    name: str
    dtype: str
    free: Mapping[int, str]

    @property
    def by_image(self) -> bool:
        """Whether it has a row for each sample of the batch."""
        return self.free.get(0) == BATCH

    def cast(self, value: Any) -> Tensor:
        """A value as the graph takes it, on the CPU."""
        return torch.as_tensor(value).detach().to("cpu", DTYPES[self.dtype])


@dataclass(frozen=True)
class Interface:
    """All inputs, x_t first, then the timestep.

    Attributes: arguments: names of the denoiser's arguments in their order, for those that pipelines pass by position.
    """

    arguments: tuple[str, ...]
    inputs: tuple[Input, ...]

    @property
    def names(self) -> list[str]:
        """Of the inputs, in order."""
        return [given.name for given in self.inputs]

    @property
    def free(self) -> dict[str, dict[int, str]]:
        """The free axes of each input that has some, and of the prediction, whose image or tokens are those of x_t."""
        axes = {given.name: dict(given.free) for given in self.inputs if given.free}
        return axes | {"prediction": dict(self.inputs[0].free)}

    def to_json(self) -> dict[str, Any]:
        """For the export's card."""
        inputs = [
            {"name": i.name, "dtype": i.dtype, "free": {str(k): v for k, v in i.free.items()}} for i in self.inputs
        ]
        return {"arguments": list(self.arguments), "inputs": inputs}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Interface:
        """What `to_json` wrote."""
        inputs = [Input(i["name"], i["dtype"], {int(k): v for k, v in i["free"].items()}) for i in content["inputs"]]
        return Interface(tuple(content["arguments"]), tuple(inputs))


IMAGE = {0: BATCH, 2: "height", 3: "width"}
TEXT = {0: BATCH, 1: "text"}
UNCONDITIONAL = Interface(("sample", TIMESTEP), (Input("sample", "float32", IMAGE), Input(TIMESTEP, "float32", {})))
"""That of a denoiser of images without conditions."""
FREE: dict[str, dict[str, dict[int, str]]] = {
    "UNet2DModel": {"sample": IMAGE},
    "UNet2DConditionModel": {"sample": IMAGE, "encoder_hidden_states": TEXT, "encoder_attention_mask": TEXT},
    # draws one size alone: its pipeline has no other
    "DiTTransformer2DModel": {},
    "PixArtTransformer2DModel": {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "encoder_attention_mask": TEXT,
    },
    "SD3Transformer2DModel": {"hidden_states": IMAGE, "encoder_hidden_states": TEXT},
    "FluxTransformer2DModel": {
        "hidden_states": {0: BATCH, 1: "tokens"}, "encoder_hidden_states": TEXT,
        "img_ids": {0: "tokens"}, "txt_ids": {0: "text"},
    },
}  # fmt: skip
"""The free axes of arguments by class of denoiser. Whatever has a row for each sample has a free batch, also in other classes."""
