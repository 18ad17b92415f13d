"""Recipes: which program runs, with which options. Presets are data, the same three for every recipe."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tcaq.numerics.powerlaw import Alternative
from tcaq.spec.base import Spec
from tcaq.spec.conditions import Conditions
from tcaq.spec.grid import Bits
from tcaq.spec.law import Even, Law
from tcaq.spec.steps import StepGrouping

Layers = Literal["same", "author"]
LinearInputs = Literal["static", "token"]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Strength = Fraction | Literal["layer"]
Balance = Literal["all", "steps", "bands"]


class Calibration(Spec):
    """What is recorded: `images` trajectories of `steps` steps; every step of every image, in batches of `batch`.

    `law` says how often each recorded step is used; `conditions` what conditional models are asked for (None: the pipeline's
    defaults, and the built-in prompts).
    """

    LATER = ("conditions",)

    images: Positive = 64
    steps: Positive = 50
    batch: Positive = 32
    law: Law = Even()
    conditions: Conditions | None = None


class RangeSearch(Spec):
    """How scales start: both ends shrink over `candidates` factors (1: min-max), scored by |x - x_hat|^power."""

    weight_candidates: Positive = 80
    input_candidates: Positive = 80
    power: Annotated[float, Field(gt=0)] = 2.4
    values: Positive = 4096


class Tcr(Spec):
    """Timestep-channel joint reparameterization; `percentile` 0 is the paper's minimum, `strength` 1 its vector.

    `kinds` are the layers that have it; None: convolutions, and linear layers as well where they hold most of the weights.
    `strength` is that of convolutions, `linear_strength` of linear layers; "layer" (ours) takes, layer by layer, the one that
    predicts the least rounding noise in the output. A weak channel makes every other ratio large, which costs nothing: the
    input's scale takes a common factor back. What costs is a tight `truncate`, because where most entries are cut to one number,
    nothing is equalized any more.
    """

    percentile: Fraction = 0.0
    truncate: Annotated[float, Field(ge=1)] = 1e4
    strength: Strength = 0.5
    linear_strength: Strength = "layer"
    kinds: tuple[Literal["conv", "linear"], ...] | None = None


class Daq(Spec):
    """Dynamically adaptive quantizer for attention probabilities.

    `criterion` "likelihood" is the paper's: log2 where R > 0; "error" (ours) takes the grid whose measured error is smaller. R is
    recorded either way. `octaves` (ours) is how far below its peak the log2 grid reaches: fewer octaves leave more values to
    each; None is the paper's grid of powers of two.
    """

    criterion: Literal["likelihood", "error"] = "error"
    alternative: Alternative = "exponential"
    p_min: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    octaves: Annotated[int, Field(ge=4, le=255)] | None = 8

    def per_octave(self, bits: int) -> int:
        """How many values a log2 grid has to each halving."""
        return 1 if self.octaves is None else max(1, 2**bits // self.octaves)


class Gptq(Spec):
    """Weights rounded with error feedback (GPTQ) in place of rounding to nearest, before any reconstruction; no gradients.

    It sees `inputs` recorded inputs, in batches of `batch`. `damping` is added to the diagonal of each layer's Hessian, as a part
    of its mean. A layer with more than `width` columns (ours) has errors fed back within runs of as many columns, which bounds
    memory. `trust` says how firmly reconstruction, if there is any, holds the roundings found; see Alignment.
    """

    inputs: Positive = 512
    batch: Positive = 32
    damping: Annotated[float, Field(gt=0)] = 0.01
    width: Positive = 4096
    trust: Fraction = 0.8


class Reconstruction(Spec):
    """Block reconstruction: AdaRound and learned step sizes, unit by unit in execution order.

    `penalty` weighs the mean rounding penalty of a unit's weights against its loss, relative to the loss it starts from: the same
    number means the same pull for every unit, whatever the size of its output. A rate of 0 leaves that part as it is:
    `scale_rate` is that of the inputs' step sizes, `weight_rate` of the weights', wherever roundings are not learned as well;
    `bias_rate` corrects the biases, in what one code of a layer's input is worth in its output. `balance` "steps" divides the loss
    by the one each step group starts from, "all" by their mean, under which the steps with the largest errors decide alone; "bands"
    divides that of each band of spatial frequencies in each step group, so that fine noise does not hide errors of whole pictures.

    With a `stretch` of more than one, batches are made of as many steps of an image in a row (no more than a batch holds), and the
    mean of their errors counts too, as `together` of the loss: a sampler adds predictions up, in which errors that steps share
    remain and others cancel.
    """

    LATER = ("stretch", "together")

    iterations: Positive = 1000
    batch: Positive = 32
    inputs: Positive = 1024
    schedule: Literal["joint", "two-phase"] = "joint"
    rounding_rate: Annotated[float, Field(ge=0)] = 3e-2
    scale_rate: Annotated[float, Field(ge=0)] = 3e-3
    weight_rate: Annotated[float, Field(ge=0)] = 0.0
    bias_rate: Annotated[float, Field(ge=0)] = 0.0
    power: Annotated[float, Field(gt=0)] = 2.0
    balance: Balance = "steps"
    penalty: Annotated[float, Field(ge=0)] = 1.0
    warmup: Fraction = 0.2
    drop: Fraction = 0.5
    stretch: Positive = 1
    together: Fraction = 0.5


class NetworkFit(Spec):
    """The whole denoiser as one unit (ours): its step sizes and biases, the roundings staying as they are.

    The fields mean what they mean in Reconstruction.
    """

    iterations: Positive = 400
    batch: Positive = 16
    inputs: Positive = 1024
    scale_rate: Annotated[float, Field(ge=0)] = 3e-3
    weight_rate: Annotated[float, Field(ge=0)] = 0.0
    bias_rate: Annotated[float, Field(ge=0)] = 1e-2
    balance: Balance = "bands"
    stretch: Positive = 4
    together: Fraction = 0.5

    def reconstruction(self) -> Reconstruction:
        """The same as options of a unit's fit that decides no rounding and mixes no float inputs in: there are none."""
        return Reconstruction(**self.model_dump(), rounding_rate=0.0, drop=0.0)


def check_ascending(bits: tuple[int, ...]) -> None:
    """Raises: ValueError unless each width is above the one before."""
    if any(b <= a for a, b in pairwise(bits)):
        raise ValueError(f"bits must ascend strictly, given {bits}")


class Mixed(Spec):
    """Step-aware mixed precision (PTQD): each step group has the narrowest of these widths whose noise is small enough.

    Small enough is a signal-to-noise ratio of the prediction above that of x_t itself. `snr` "norms" is the paper's ratio, of
    two-norms; "powers" (ours) squares it, as the ratio that it is compared with is squared, and so finds narrow widths enough more
    often. Weights keep one width.
    """

    bits: Annotated[tuple[Bits, ...], Field(min_length=2)] = (4, 8)
    snr: Literal["norms", "powers"] = "norms"

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        check_ascending(self.bits)
        return self


class Allocation(Spec):
    """A width for each layer's weight, or input, of `bits`, so that they have `mean` bits on average (None: the recipe's) (ours).

    Weights count as often as there are numbers in them, inputs as often as products read them. What rounding each does to
    predictions is measured by gradients on `inputs` recorded inputs, in batches of `batch`; the
    number of batches is what its precision depends on.
    """

    bits: Annotated[tuple[Bits, ...], Field(min_length=2)] = (2, 3, 4, 5, 6, 8)
    mean: Annotated[float, Field(gt=2, lt=8)] | None = None
    inputs: Positive = 512
    batch: Positive = 4

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        check_ascending(self.bits)
        return self


class Grouping(Spec):
    """A search for `groups` sets of steps that share their grids (APQ-DM).

    `confidence` is how far a step's weight for its first group leads the others when the search begins.
    """

    groups: Annotated[int, Field(ge=2)] = 8
    iterations: Positive = 200
    inputs: Positive = 512
    batch: Positive = 16
    rate: Annotated[float, Field(gt=0)] = 0.1
    confidence: Annotated[float, Field(gt=0)] = 2.0


class Correction(Spec):
    """What is known of the noise in predictions is taken out of them, step by step (PTQD).

    `slope`: the part that follows the prediction. At few bits it is negative, because fits by squared error shrink what they are
    unsure of. `bias`: the mean of each channel. Dividing by 1 + slope amplifies what is not known, and with few sampling steps
    that can cost more than it gains. So `strengths` (ours) are tried, 0 too, and the one stays whose calibration images are
    closest to the float model's; none: full strength untried. `sampler`: let stochastic samplers add less noise of their own.
    """

    slope: bool = True
    bias: bool = True
    strengths: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.5, 1.0)
    sampler: bool = False


class Bypass(Spec):
    """What x_t has beyond `reach` standard deviations goes around the denoiser with the gain of the float model (ours).

    Low-bit denoisers stop to answer to pixels that lie far out, and samplers that do not clip magnify what was not answered. The
    gain is measured on `images` trajectories, with a `share` of their elements moved.
    """

    reach: Annotated[float, Field(ge=1)] = 3.0
    images: Positive = 16
    share: Annotated[float, Field(gt=0, le=0.1)] = 1e-3


class Stagger(Spec):
    """Step sizes of inputs that go up and down from step to step, within `exp(-spread)` and `exp(spread)` of those found (ours).

    What a layer sees changes little between steps; on one grid it would be rounded the same way at each, and a sampler adds up what
    steps have in common. Operands of more than `bits` bits stay as they are.
    """

    spread: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    bits: Bits = 6


class Alignment(Spec):
    """Progressively aligned reconstruction: further rounds on trajectories of the quantized model.

    `trust` says how firmly the roundings of the round before are held: 0 starts again at the float weight, 1 at the roundings.
    """

    rounds: Annotated[int, Field(ge=0)] = 1
    iterations: Positive = 300
    trust: Fraction = 0.8


class Recipe(Spec):
    """A named program with all its options; None switches a part off.

    `layers` "same" plans the same layers whatever the program, "author" those that the authors' own code quantizes.
    `network` (ours) fits the whole denoiser as one unit after the last round, on trajectories of the quantized model;
    `correction` comes last. `linear_inputs` "token" gives the inputs of linear layers a grid for each token, found while it runs.
    With `allocation` the weights that would have `weights` bits get their width by layer, with `input_allocation` the inputs of
    convolutions and linear layers that would have `activations` bits.
    With `mixed` the operands that would have `activations` bits get their width by step group; `activations` is the narrowest.
    """

    LATER = ("linear_inputs", "mixed", "gptq", "allocation", "input_allocation")

    program: str = "tcaq"
    weights: Bits = 4
    activations: Bits = 4
    step_groups: StepGrouping = "per-step"
    layers: Layers = "same"
    linear_inputs: LinearInputs = "static"
    calibration: Calibration = Calibration()
    bypass: Bypass | None = Bypass()
    ranges: RangeSearch = RangeSearch()
    tcr: Tcr | None = Tcr()
    daq: Daq | None = Daq()
    stagger: Stagger | None = Stagger()
    allocation: Allocation | None = None
    input_allocation: Allocation | None = None
    mixed: Mixed | None = None
    gptq: Gptq | None = None
    grouping: Grouping | None = None
    reconstruction: Reconstruction | None = Reconstruction()
    alignment: Alignment | None = Alignment()
    network: NetworkFit | None = NetworkFit()
    correction: Correction | None = Correction()
    memory: Annotated[
        float,
        Field(
            gt=0,
            description="GiB that trajectories, and the cache of activations, may each hold before they spill to disk",
        ),
    ] = 4.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _the_budget_leaves_a_choice(self) -> Self:
        for name, of in (("allocation", "weights"), ("input_allocation", "activations")):
            spec: Allocation | None = getattr(self, name)
            if spec is None:
                continue
            what, mean = (of, getattr(self, of)) if spec.mean is None else (f"{name}.mean", spec.mean)
            if not spec.bits[0] < mean < spec.bits[-1]:
                raise ValueError(f"{name}.bits {spec.bits} must reach below and above {what}, {mean:g} bits on average")
        if self.input_allocation is not None and self.mixed is not None:
            raise ValueError("inputs choose their width by layer (input_allocation) or by step (mixed): leave one out")
        return self

    @model_validator(mode="after")
    def _widths_can_change(self) -> Self:
        if self.mixed is None:
            return self
        if self.activations != self.mixed.bits[0]:
            raise ValueError(
                f"activations has {self.activations} bits, the narrowest of mixed.bits is {self.mixed.bits[0]}: make them equal"
            )
        if self.step_groups == 1:
            raise ValueError(
                "widths that change by step need more than one step group: step_groups 'per-step' or a number"
            )
        if self.linear_inputs == "token":
            raise ValueError(
                "a grid for each token has one width for all steps: leave out linear_inputs 'token' or mixed"
            )
        return self

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """This recipe with some fields changed, inner ones too. Raises: UsageError listing every value not allowed."""
        return Recipe.parse(merged(self.model_dump(mode="json"), changes), where="changed recipe")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, dictionaries inside dictionaries included."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
