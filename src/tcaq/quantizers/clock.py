"""The step clock: the one place that knows which step group each sample of the running batch is in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.spec.steps import StepGroups


class StepClock(nn.Module):
    """Maps timesteps to step groups and holds the groups of the running forward pass.

    Attributes: group: int64 [batch] or [1], written before each forward pass.
    """

    group: Tensor

    def __init__(self, groups: StepGroups) -> None:
        super().__init__()
        self.groups = groups
        self.count = groups.count
        self._copies: dict[torch.device, Tensor] = {}
        self.register_buffer("group", torch.zeros(1, dtype=torch.int64), persistent=False)

    @property
    def boundaries(self) -> Tensor:
        """float32 [groups - 1]; no buffer, because casting a model to bfloat16 would move them by whole timesteps."""
        return torch.tensor(self.groups.boundaries, dtype=torch.float32)

    def _boundaries_on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.boundaries
        # copied to a device once: a copy in every pass makes it wait, and cannot be recorded as a CUDA graph
        if device not in self._copies:
            self._copies[device] = self.boundaries.to(device)
        return self._copies[device]

    def set(self, timestep: Tensor | float) -> None:
        """Write the groups of the samples' timesteps: a number, a 0-d tensor or a tensor [batch]."""
        t = torch.as_tensor(timestep).reshape(-1).float().contiguous()  # pipelines expand one number to a batch
        self.group = torch.searchsorted(self._boundaries_on(t.device), t, right=True)

    def row(self, table: Tensor, dims: int) -> Tensor:
        """The rows of a table [groups] for the running batch, shaped [batch or 1, 1, ...] with `dims` dimensions."""
        rows = table if self.count == 1 else table[self.group.to(table.device)]
        return rows.reshape(-1, *[1] * (dims - 1))
