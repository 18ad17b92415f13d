"""Widths: choose each step group's activation width by its signal-to-noise ratio (PTQD, He et al., NeurIPS 2023, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tcaq.layers.modes import faking, floating
from tcaq.models.bypass import common_channels
from tcaq.models.denoiser import clock_of
from tcaq.models.forward_process import ForwardProcess
from tcaq.models.trajectories import Trajectories, predict
from tcaq.numerics.snr import as_noise, forward_snr, narrowest, noise_snr
from tcaq.quantizers.mixed import set_widths
from tcaq.records import Record
from tcaq.spec.recipe import Mixed
from tcaq.stages.rows import table_rows


def measure_widths(
    denoiser: nn.Module, trajectories: Trajectories, process: ForwardProcess, spec: Mixed, batch: int,
    calibrate: Callable[[], None],
) -> Record:  # fmt: skip
    """Record `bits`, int64 [groups], and why: `timesteps`, `forward` [calls] and `quantized` [widths, calls], ratios in float64.

    At each width the quantized model predicts what it is given over the float model's trajectories. A group that holds several
    calls has the width that the most demanding one needs; a group that none fell into that of its neighbour.

    Args: batch: images at a time; calibrate: gives all quantizers their scales for the widths that they have then.
    """
    clock = clock_of(denoiser)
    ratios: list[Tensor] = []
    for bits in spec.bits:
        set_widths(denoiser, torch.full((clock.count,), bits))
        calibrate()
        calls = range(len(trajectories.timesteps))
        found = [call_snr(denoiser, trajectories, process, call, batch, squared=spec.snr == "powers") for call in calls]
        ratios.append(torch.cat(found))
    forward, quantized = forward_snr(process.signal_share(trajectories.timesteps)), torch.stack(ratios)
    rows = table_rows(clock.boundaries, trajectories.timesteps)
    position = narrowest(quantized, forward)[rows.positions].amax(1)[rows.of_group]
    tensors = {"timesteps": trajectories.timesteps, "forward": forward, "quantized": quantized}
    return Record(tensors | {"bits": torch.tensor(spec.bits)[position]}, {"widths": list(spec.bits), "snr": spec.snr})


def call_snr(
    denoiser: nn.Module, trajectories: Trajectories, process: ForwardProcess, call: int, batch: int, *, squared: bool
) -> Tensor:
    """SNR_Q of one call, float64 [1]; what all calls predict may not fit into memory at once."""
    with floating(denoiser):
        original = predicted_noise(denoiser, trajectories, process, call, batch)
    with faking(denoiser):
        error = predicted_noise(denoiser, trajectories, process, call, batch) - original
    return noise_snr(original, error, squared=squared)


def predicted_noise(
    denoiser: nn.Module, trajectories: Trajectories, process: ForwardProcess, call: int, batch: int
) -> Tensor:  # fmt: skip
    """The noise that the denoiser sees, float32 [1, images, ...], in the channels that x_t and its prediction share."""
    prediction, x = predict(denoiser, trajectories, [call], batch), trajectories.call(call).sample[None]
    axis, channels = common_channels(x[0], prediction[0])
    x, prediction = (part.narrow(axis, 0, channels).float() for part in (x, prediction))
    share = process.signal_share(trajectories.timesteps[call : call + 1])
    return as_noise(prediction, x, share, process.prediction)
