"""TCR, timestep-channel joint reparameterization: one vector per layer that moves range from its input to its weight.

`Y = W X = (W * r)(X / r)`, per input channel (TCAQ-DM, Huang et al. 2025, section on TCR).
"""

from __future__ import annotations

from torch import Tensor


def tcr_vector(maxima: Tensor, *, percentile: float, truncate: float, strength: float = 1.0) -> Tensor:
    """The joint vector r over all steps, steps with large ranges counting more.

    `s_t` = the given percentile of `m_t` over channels (the paper's minimum is percentile 0, which one dead channel
    makes explode: ours is a low percentile); `r_t = max(m_t / s_t, 1)`; `r = sum_t m_t r_t / sum_t m_t`, cut at
    `truncate`, to the power `strength`.

    Args: maxima: float [T, C], max |X_t[c]| at each step; percentile in [0, 1]; truncate >= 1; strength in [0, 1].
    Returns: r, float32 [C], every entry in [1, truncate]; channels that are zero at every step keep 1.
    """
    m = maxima.double()
    target = m.quantile(percentile, dim=1, keepdim=True)
    # a step whose low channels are all dead still needs a finite ratio
    target = target.clamp(min=1e-6).maximum(m.amax(dim=1, keepdim=True) * 1e-6)
    ratio = (m / target).clamp(min=1.0)
    total = m.sum(dim=0)
    joint = (m * ratio).sum(dim=0) / total.clamp(min=1e-12)
    joint = joint.where(total > 0, joint.new_ones(()))
    return joint.clamp(1.0, truncate).pow(strength).float()


def shared_worth(low: Tensor, high: Tensor, vector: Tensor, bits: int) -> Tensor:
    """What a code of an input is worth at each step where one grid serves all channels, in units of x / r: float32 [steps].

    Args: low, high: ends of each channel's values, float [steps, channels]; vector: r, float [channels].
    """
    reach = (high.float() / vector).amax(dim=1).clamp(min=0) - (low.float() / vector).amin(dim=1).clamp(max=0)
    worth: Tensor = reach / (2**bits - 1)
    return worth


def predicted_noise(weight: Tensor, vector: Tensor, worth: Tensor, squares: Tensor, *, weight_bits: int) -> float:
    """What rounding is expected to add to a layer's output with a TCR vector, summed over output channels, the mean over steps.

    Ranges of weights count as min-max, errors as independent. An error is even within a code's worth, `s_t r[c]` for an input of
    channel c, which meets all weights of c, and `s_o / r[c]` for a weight, which meets the input's mean square. None is larger than
    the value itself, which is what is left where everything rounds to zero.

    Args: weight: float [out, channels, ...]; vector: r, float [channels]; worth: s_t, of a code of x / r, float [steps];
        squares: mean square of each channel's values, float [steps, channels].
    """
    # single precision: weights of large layers are gigabytes in double
    r, w = vector.float(), weight.float().reshape(*weight.shape[:2], -1)
    scaled = w * r[:, None]
    weight_reach = scaled.amax(dim=(1, 2)).clamp(min=0) - scaled.amin(dim=(1, 2)).clamp(max=0)
    weight_worth = weight_reach[:, None] / r / (2**weight_bits - 1)
    power = w.square().sum(dim=2)
    input_error = ((worth[:, None] * r).square() / 12).minimum(squares).mean(dim=0)
    weight_error = (weight_worth.square() / 12 * w.shape[2]).minimum(power)
    return float((input_error * power).sum() + (weight_error * squares.mean(dim=0)).sum())
