"""Another scheduler gets what it has to know of the first one, or the error says why it cannot."""

from __future__ import annotations

import diffusers
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tcaq.errors import UsageError
from tcaq.models.switch import use_scheduler


class Pipe:
    """A pipeline's scheduler, and how it is changed."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def register_modules(self, scheduler):
        self.scheduler = scheduler


def test_flows_stay_flows_there_and_back():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler(shift=3.0))
    use_scheduler(pipe, "DPMSolverMultistepScheduler")
    use_scheduler(pipe, "UniPCMultistepScheduler")
    assert pipe.scheduler.config.prediction_type == "flow_prediction"
    assert (pipe.scheduler.config.use_flow_sigmas, pipe.scheduler.config.flow_shift) == (True, 3.0)
    with pytest.raises(UsageError, match="of flow matching"):
        use_scheduler(pipe, "DDIMScheduler")
    use_scheduler(pipe, "FlowMatchHeunDiscreteScheduler")
    assert pipe.scheduler.config.shift == 3.0


def test_a_plain_model_is_no_flow():
    with pytest.raises(UsageError, match="of flow matching"):
        use_scheduler(Pipe(DPMSolverMultistepScheduler()), "FlowMatchEulerDiscreteScheduler")


def test_a_missing_package_is_named(monkeypatch):
    class Stand:
        _backends = ("torch", "torchsde")

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", Stand)
    with pytest.raises(UsageError, match="packages that are not all installed: torch, torchsde"):
        use_scheduler(Pipe(DPMSolverMultistepScheduler()), "DPMSolverSDEScheduler")


@pytest.mark.parametrize("name", ["SchedulerMixin", "UNet2DModel", "nothing"])
def test_what_is_no_scheduler_is_refused(name):
    with pytest.raises(UsageError, match="diffusers has none of that name"):
        use_scheduler(Pipe(DPMSolverMultistepScheduler()), name)
