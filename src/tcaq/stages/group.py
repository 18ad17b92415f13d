"""Group: learn which sampling steps share a row of quantization parameters (APQ-DM, Wang et al., CVPR 2024, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tcaq.layers.modes import faking, floating
from tcaq.models.denoiser import clock_of
from tcaq.models.device import device_of
from tcaq.models.trajectories import Trajectories
from tcaq.quantizers.affine import AffineQuantizer
from tcaq.records import Record
from tcaq.spec.recipe import Daq, Grouping, RangeSearch
from tcaq.spec.steps import StepGroups
from tcaq.stages.draw import draw_parts
from tcaq.stages.scale import affine_operands, apply_input_scales, scale_inputs
from tcaq.stages.select import apply_choices, select
from tcaq.stages.teaching import choose


def group(
    denoiser: nn.Module, trajectories: Trajectories, ranges: Record, search: RangeSearch, spec: Grouping, seed: int,
    daq: Daq | None = None,
) -> Record:  # fmt: skip
    """Record `classes`, int64 [steps], the group that each step belongs to in the end, and how the loss fell.

    Each step holds a weight for each of a few groups. The scale it quantizes with is the groups' scales mixed by the
    softmax of these weights, and the error of the predicted noise says which way the weights move. At the end each step
    belongs to the group of its largest weight. Attention probabilities keep the grids that the groups begin with.

    Args: daq: how these are chosen (None: its defaults).
    """
    clock = clock_of(denoiser)
    groups_of_steps = torch.searchsorted(
        clock.boundaries, trajectories.timesteps.to(clock.boundaries.dtype), right=True
    )
    start = uniform_classes(trajectories.timesteps, spec.groups)
    apply_input_scales(denoiser, scale_inputs(denoiser, ranges, search, lambda _: start))
    apply_choices(denoiser, select(denoiser, ranges, daq or Daq(), search, lambda _: start))
    mixtures = [Mixture(quantizer, start, groups_of_steps) for _, _, quantizer, _ in affine_operands(denoiser)]
    first = torch.nn.functional.one_hot(start, int(start.max()) + 1).float() * spec.confidence
    logits = first.to(device_of(denoiser)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=spec.rate)
    parts = draw_parts(trajectories, spec.inputs, seed)
    with floating(denoiser), torch.no_grad():
        answers = [torch.cat([batch(denoiser) for batch in part.split(spec.batch)]) for part in parts]
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    frozen = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for _ in range(spec.iterations):
        shares = torch.softmax(logits, dim=1)
        for mixture in mixtures:
            mixture.mix(shares)
        number = choose([len(part) for part in parts], generator)
        inputs, targets = parts[number], answers[number]
        rows = torch.randint(len(targets), (min(spec.batch, len(targets)),), generator=generator)
        with faking(denoiser):
            error = inputs[rows](denoiser) - targets[rows]
        loss = (error.flatten(1).square().mean(1) / targets[rows].flatten(1).square().mean(1).clamp(min=1e-20)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for mixture in mixtures:
        mixture.quantizer.log_gain = None
    for parameter in frozen:
        parameter.requires_grad_(True)
    classes = logits.detach().cpu().argmax(dim=1)
    # calls at one timestep share a row, which followed the last of them
    last_of = torch.zeros(clock.count, dtype=torch.int64)
    last_of[groups_of_steps] = torch.arange(len(groups_of_steps))
    return Record({"classes": classes[last_of[groups_of_steps]], "start": start}, {"losses": losses})


def uniform_classes(timesteps: Tensor, count: int) -> Tensor:
    """Contiguous groups of about equally many steps, int64 [steps]."""
    boundaries = torch.tensor(StepGroups.of(count, timesteps.tolist()).boundaries)
    return torch.searchsorted(boundaries, timesteps.to(boundaries.dtype), right=True)


class Mixture:
    """One quantizer whose rows, a row a step, are mixed from the rows of a few groups."""

    def __init__(self, quantizer: AffineQuantizer, classes: Tensor, groups_of_steps: Tensor) -> None:
        """Args: classes: [steps], with which the quantizer was calibrated; groups_of_steps: [steps], each step's row."""
        self.quantizer = quantizer
        first = torch.tensor([int((classes == c).nonzero()[0]) for c in range(int(classes.max()) + 1)])
        rows = groups_of_steps[first]
        self.scales, self.zero_points = quantizer.scale[rows].clone(), quantizer.zero_point[rows].clone()
        # rows of step groups that no step fell into are never read here
        self.step_of = torch.zeros(quantizer.clock.count, dtype=torch.int64)
        self.step_of[groups_of_steps] = torch.arange(len(groups_of_steps))

    def mix(self, shares: Tensor) -> None:
        """Give the quantizer the rows that follow from each step's shares, [steps, classes]; gradients reach the shares."""
        self.quantizer.zero_point.copy_(self.zero_points[shares.argmax(dim=1)][self.step_of])
        mixed = (shares @ self.scales)[self.step_of]
        self.quantizer.follow(mixed)
