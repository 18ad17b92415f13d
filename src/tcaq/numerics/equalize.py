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
