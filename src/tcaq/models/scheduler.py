"""Schedulers that add less noise of their own where quantization has added some already (PTQD, He et al. 2023, section 3.3).

Importing `tcaq` is enough for diffusers to load them. They matter where sampling is stochastic: DDPM, and DDIM with eta above 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tcaq.numerics.correction import variance_left
from tcaq.numerics.snr import variance_of_noise

OPTION = "quantization_noise"


class NoiseAware:
    """Mixin of a scheduler whose config holds `quantization_noise`: `boundaries` of timesteps [groups - 1], `variance` [groups]."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the option in the signature, where diffusers looks for what a config may hold."""
        super().__init_subclass__(**kwargs)
        original = inspect.signature(cls.__mro__[2].__init__)  # type: ignore[misc]
        option = inspect.Parameter(OPTION, inspect.Parameter.KEYWORD_ONLY, default=None)
        cls.__init__.__signature__ = original.replace(parameters=[*original.parameters.values(), option])  # type: ignore[attr-defined]

    def brought(self, timestep: Tensor | float) -> Tensor:
        """The variance of what quantization adds to the noise that a prediction at a timestep stands for, a scalar."""
        scheduler = cast(Any, self)
        found = scheduler.config.quantization_noise
        if found is None:
            return torch.zeros(())
        group = sum(float(timestep) >= boundary for boundary in found["boundaries"])
        share, kind = scheduler.alphas_cumprod[int(timestep)], scheduler.config.prediction_type
        return float(found["variance"][group]) * variance_of_noise(share, kind)


def _products(scheduler: Any, timestep: int, previous: int, final: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative products of alpha at a timestep and the one before it."""
    table = scheduler.alphas_cumprod
    return table[timestep], table[previous] if previous >= 0 else final


class NoiseAwareDDIMScheduler(NoiseAware, DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler with less noise of its own."""

    def __init__(self, *args: Any, quantization_noise: dict[str, Any] | None = None, **kwargs: Any) -> None:
        DDIMScheduler.__init__(self, *args, **kwargs)
        self.register_to_config(quantization_noise=quantization_noise)

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False,
        generator: Any = None, variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """One step; arguments and result are those of DDIMScheduler."""
        if eta > 0 and variance_noise is None:
            own = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            variance_noise, generator = own * self._share(int(timestep), eta).to(own), None
        return super().step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
        )

    def _share(self, timestep: int, eta: float) -> Tensor:
        """The part of its noise that the sampler still has to add, a standard deviation over a standard deviation."""
        previous = timestep - self.config.num_train_timesteps // self.num_inference_steps
        now, before = _products(self, timestep, previous, self.final_alpha_cumprod)
        variance = eta**2 * self._get_variance(timestep, previous)
        gain = (1 - before - variance).clamp(min=0).sqrt() - (before * (1 - now) / now).sqrt()
        left = variance_left(variance, gain, self.brought(timestep))
        return torch.sqrt(left / variance.clamp(min=1e-20))


class NoiseAwareDDPMScheduler(NoiseAware, DDPMScheduler):  # type: ignore[misc]
    """diffusers' DDPMScheduler with less noise of its own, for fixed variances; learned ones stay as they are."""

    def __init__(self, *args: Any, quantization_noise: dict[str, Any] | None = None, **kwargs: Any) -> None:
        DDPMScheduler.__init__(self, *args, **kwargs)
        self.register_to_config(quantization_noise=quantization_noise)

    def _get_variance(self, t: int, predicted_variance: Tensor | None = None, variance_type: Any = None) -> Tensor:
        variance = cast(Tensor, super()._get_variance(t, predicted_variance, variance_type))
        if (variance_type or self.config.variance_type) not in ("fixed_small", "fixed_large"):
            return variance
        now, before = _products(self, t, self.previous_timestep(t), self.one)
        # the weight of the predicted noise in the mean (formula 7 of DDPM, by way of the predicted image)
        gain = (before / now).sqrt() * (1 - now / before) / (1 - now).sqrt()
        return variance_left(variance, gain, self.brought(t)).clamp(min=1e-20)


AWARE: dict[type, type] = {DDIMScheduler: NoiseAwareDDIMScheduler, DDPMScheduler: NoiseAwareDDPMScheduler}


def noise_aware(scheduler: SchedulerMixin, boundaries: Sequence[float], variance: Sequence[float]) -> SchedulerMixin:
    """A scheduler like this one that knows of the noise in its predictions; the same scheduler if there is no such kind of it."""
    kind = cast(Any, AWARE.get(type(scheduler)))
    if kind is None:
        return scheduler
    noise = {"boundaries": list(boundaries), "variance": list(variance)}
    return cast(SchedulerMixin, kind.from_config(cast(Any, scheduler).config, quantization_noise=noise))
