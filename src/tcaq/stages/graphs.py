"""Steps of learning as CUDA graphs: one launch in place of the hundreds that a step of a small unit is made of.

A GPU computes a small unit's step faster than Python can launch its parts. A graph holds all launches of a step; replayed, it does
them again on the same memory. So what changes from step to step is copied into tensors that stay.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Launch = Callable[[], object]
Form = tuple[int | bool, ...]


class Recorder(Protocol):
    """Turns launches into a graph."""

    def plainly(self, launch: Launch) -> None:
        """Launch for real, as a graph's own stream would."""

    def captured(self, launch: Launch) -> Launch:
        """Record what `launch` launches, of which nothing runs, and return what replays it."""


class CudaRecorder:
    """Records CUDA graphs that share their memory, for no two of them run at once."""

    def __init__(self, device: torch.device, generator: torch.Generator) -> None:
        """Args: generator: of the device, from which a step draws; each replay goes on where the one before it stopped."""
        self._device, self._generator = device, generator
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def plainly(self, launch: Launch) -> None:
        """Launch on a stream beside the default one, which graphs cannot be recorded from."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            launch()
        outside.wait_stream(self._stream)

    def captured(self, launch: Launch) -> Launch:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            launch()
        replay: Launch = graph.replay
        return replay


class RecordedStep:
    """A step that is run plainly a few times in each of its forms, recorded, and replayed from then on.

    What it does may depend on its form in any way, on its values only on the device. A step that reads a value on the host cannot
    be recorded: it goes on plainly, with a warning.
    """

    PLAIN = 3
    """Runs before the recording: what libraries choose and optimizers create in them must not be part of it."""

    def __init__(self, step: Callable[..., None], recorder: Recorder, device: torch.device) -> None:
        """Args: step: called with the parts of a form, and tensors on the device for the values."""
        self._step, self._recorder, self._device = step, recorder, device
        self._runs: dict[Form, int] = {}
        self._kept: dict[Form, tuple[Tensor, ...]] = {}
        self._replays: dict[Form, Launch] = {}

    def __call__(self, form: Form, *values: Tensor | float) -> None:
        """Do the step. Args: form: each is recorded once; values: of one shape and dtype in every step of a form."""
        kept = self._values(form, values)
        if form in self._replays:
            self._replays[form]()
            return
        if self._runs.setdefault(form, 0) < self.PLAIN:
            self._runs[form] += 1
            self._recorder.plainly(lambda: self._step(*form, *kept))
            return
        self._replays[form] = self._recorded(lambda: self._step(*form, *kept))
        self._replays[form]()

    def _values(self, form: Form, values: tuple[Tensor | float, ...]) -> tuple[Tensor, ...]:
        given = [torch.as_tensor(value) for value in values]
        if form not in self._kept:
            self._kept[form] = tuple(torch.empty_like(value, device=self._device) for value in given)
        for kept, value in zip(self._kept[form], given, strict=True):
            kept.copy_(value)
        return self._kept[form]

    def _recorded(self, launch: Launch) -> Launch:
        try:
            return self._recorder.captured(launch)
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
            warnings.warn(
                f"this model's steps of learning cannot be recorded as CUDA graphs, and run several times slower: {problem}",
                RuntimeWarning,
                stacklevel=4,
            )
            return launch


class DeviceCosine:
    """`CosineAnnealingLR` down to zero, with rates that lie where recorded steps of the optimizer read them."""

    def __init__(self, optimizer: torch.optim.Optimizer, iterations: int, device: torch.device) -> None:
        groups = optimizer.param_groups
        self._initial = torch.tensor([group["lr"] for group in groups], dtype=torch.float32, device=device)
        self._iterations, self._count, self._rates = iterations, 0, self._initial.clone()
        for group, rate in zip(groups, self._rates.unbind(), strict=True):
            group["lr"] = rate

    def step(self) -> None:
        """Move to the rates of the next step."""
        self._count += 1
        torch.mul(self._initial, (1 + math.cos(math.pi * self._count / self._iterations)) / 2, out=self._rates)
