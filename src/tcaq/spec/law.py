"""Laws by which calibration inputs are taken from the recorded steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tcaq.spec.base import Spec


class Even(Spec):
    """Every step equally often."""

    kind: Literal["even"] = "even"


class SkewedNormal(Spec):
    """t from a normal law with these parts of the largest timestep as mean and deviation, clamped (PTQ4DM)."""

    kind: Literal["skewed-normal"] = "skewed-normal"
    mean: Annotated[float, Field(ge=0, le=1)] = 0.4
    deviation: Annotated[float, Field(gt=0)] = 0.4


class Stride(Spec):
    """Every n-th step alone (Q-Diffusion)."""

    kind: Literal["stride"] = "stride"
    every: Annotated[int, Field(ge=1)] = 5


class Active(Spec):
    """The step whose images tell most, each visit lowering its rank by `price` nats (APQ-DM)."""

    kind: Literal["active"] = "active"
    price: Annotated[float, Field(ge=0)] = 2.0


Law = Annotated[Even | SkewedNormal | Stride | Active, Field(discriminator="kind")]
