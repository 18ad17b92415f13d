"""Draw the inputs that stages learn from out of recorded trajectories, and replay units over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tcaq.layers.modes import Mode
from tcaq.models.trajectories import Drawn, Trajectories
from tcaq.models.units import Unit
from tcaq.numerics.shares import quotas
from tcaq.stages.cache import ActivationCache
from tcaq.stages.call import Call
from tcaq.stages.replay import Replay


def draw_parts(trajectories: Trajectories, count: int, seed: int) -> list[Drawn]:
    """`count` of the recorded inputs, each call as often as its share says, in random order; a part for each form of call.

    Calls differ in form where guidance's halves have texts of unequal length: those make no common batch.
    """
    return _in_parts(trajectories, *_drawn(trajectories, count, seed))


def draw_windows(trajectories: Trajectories, count: int, length: int, seed: int) -> list[Drawn]:
    """As many steps in a row of each image as make about `count` inputs, but no fewer than `length`; parts as in `draw_parts`.

    Where that leaves room for fewer images than there are, the seed chooses. Windows begin at places spread evenly over the
    trajectory and go on at its beginning when they reach its end, so that every step is in as many.
    """
    steps = trajectories.steps
    calls, images = trajectories.samples.shape[:2]
    total = int(steps[-1]) + 1
    wide = min(max(count * total // (calls * images), length), total)
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: max(1, count * total // (calls * wide))]
    starts = torch.arange(len(chosen))[:, None] * total // len(chosen)
    window, inside = torch.nonzero((steps - starts) % total < wide, as_tuple=True)
    return _in_parts(trajectories, inside, chosen[window])


def stretches(part: Drawn, length: int) -> Tensor:
    """Rows of a part that are `length` steps of one image in a row, int64 [n, length]; the halves of guidance apart.

    The first and the last stretch of steps without a gap come `length` times, so that a trajectory's ends are drawn no less than
    its middle. Where a gap leaves fewer steps than `length`, they are in none; a trajectory that has no more repeats its last.
    """
    steps = part.trajectories.steps
    turn = torch.arange(len(steps)) - torch.searchsorted(steps, steps)
    own = torch.stack([part.images, turn[part.calls]], dim=1)
    found = []
    for run in own.unique(dim=0):
        rows = torch.nonzero((own == run).all(dim=1))[:, 0]
        rows = rows[part.calls[rows].argsort()]
        gaps = torch.nonzero(steps[part.calls[rows]].diff() > 1)[:, 0] + 1
        pieces = rows.tensor_split(gaps)
        long = [piece for piece in pieces if len(piece) >= length]
        found += [_stretches_of(piece, length) for piece in long or pieces]
    return torch.cat(found)


def _stretches_of(rows: Tensor, length: int) -> Tensor:
    starts = torch.arange(1 - length, len(rows)).clamp(0, max(0, len(rows) - length))
    return rows[(starts[:, None] + torch.arange(length)).clamp(max=len(rows) - 1)]


def _in_parts(trajectories: Trajectories, calls: Tensor, images: Tensor) -> list[Drawn]:
    forms = trajectories.conditioning.forms(len(trajectories.timesteps))[calls]
    return [Drawn(trajectories, calls[forms == form], images[forms == form]) for form in forms.unique()]


def _drawn(trajectories: Trajectories, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of a call and an image for each drawn input, int64 [n] both."""
    steps, images = trajectories.samples.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    # a random order of the images for each step, of which each step gives as many as its quota from the first on
    order = torch.stack([torch.randperm(images, generator=generator) for _ in range(steps)], dim=1)
    pairs = torch.stack([torch.arange(steps).expand(images, steps), order], dim=-1)
    pairs = pairs[torch.arange(images)[:, None] < quotas(trajectories.shares, count, images)]
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    return pairs[:, 0], pairs[:, 1]


class PartsReplay:
    """A replay of units over parts of drawn inputs; no batch holds inputs of two parts."""

    def __init__(
        self, denoiser: nn.Module, units: Sequence[Unit], parts: Sequence[Drawn], batch: int, cache: ActivationCache
    ) -> None:  # fmt: skip
        """Args: units: in execution order; parts: of `draw_parts`; batch: inputs of a pass; cache: for the outputs of units."""
        self.parts = parts
        batches = [part.split(batch) for part in parts]
        ends = torch.tensor([len(own) for own in batches]).cumsum(0).tolist()
        self._batches_of = [range(end - len(own), end) for end, own in zip(ends, batches, strict=True)]
        self._replay = Replay(denoiser, units, [batch for own in batches for batch in own], cache)

    def inputs(self, unit: Unit, mode: Mode, number: int) -> Call:
        """The arguments that `unit` receives in part `number` when the units before it run in `mode`."""
        return self._replay.inputs(unit, mode, self._batches_of[number])
