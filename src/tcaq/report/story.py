"""What the files of one run tell: every stage's record as plain values. A part the run does not have is empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from tcaq.records import JSON, Record
from tcaq.runs import Run
from tcaq.spec.plan import LayerGrids, ResolvedPlan
from tcaq.spec.steps import StepGroups
from tcaq.spec.widths import with_inputs, with_weights
from tcaq.stages.observe import channel_maxima

RUN_FOLDER = "run"


@dataclass(frozen=True)
class EqualizedLayer:
    """One layer's input ranges and its TCR vector.

    timesteps: [steps], in sampling order; maxima: max |x|, float32 [steps, channels]; vector: r, float32 [channels].
    """

    name: str
    timesteps: Tensor
    maxima: Tensor
    vector: Tensor

    @property
    def equalized(self) -> Tensor:
        """max |x / r|, float32 [steps, channels]."""
        return self.maxima / self.vector

    @property
    def contrast(self) -> float:
        """How unequal the entries of r are: standard deviation of log2 r."""
        return float(self.vector.double().log2().std(correction=0))


def imbalance(maxima: Tensor) -> float:
    """Largest channel over the mean channel, mean over steps; 1 if all channels reach equally far."""
    means = maxima.double().mean(dim=1).clamp(min=1e-30)
    return float((maxima.double().amax(dim=1) / means).mean())


@dataclass(frozen=True)
class Choice:
    """DAQ in one layer and step group. Errors are relative mean squares; alpha and ratio are those of the fit."""

    group: int
    use_log2: bool
    ratio: float
    error_even: float
    error_log2: float


@dataclass(frozen=True)
class UnitLoss:
    """Error of a unit's output relative to its mean square, before and after it was fitted in one round."""

    unit: str
    round: int
    before: float
    after: float


@dataclass(frozen=True)
class Score:
    """Distance between the calibration images of the float and of the quantized model after one round."""

    round: int
    fd: float


@dataclass(frozen=True)
class NoiseFit:
    """What quantization added to predicted noise, and how much of that the denoiser takes out.

    timesteps: the calibration steps, descending; slope, bias: at each, bias as the root mean square over channels; trials: the
        strengths that were tried, each with the root mean square error of its calibration images in gray levels (the geometric
        mean over images), none if nothing was compared; kept: the strength that stays.
    """

    timesteps: Sequence[float]
    slope: Sequence[float]
    bias: Sequence[float]
    trials: Sequence[tuple[float, float]]
    kept: float


@dataclass(frozen=True)
class StepWidths:
    """Why each calibration step has its width.

    timesteps: descending, each once; bits: the width that runs; forward: the ratio that a width must exceed; quantized: what each
    width has, the smallest ratio where a step makes several calls.
    """

    timesteps: Sequence[float]
    bits: Sequence[int]
    forward: Sequence[float]
    quantized: Mapping[int, Sequence[float]]

    @property
    def runs(self) -> list[tuple[float, float, int, int]]:
        """Steps in a row with one width: first and last timestep, width, how many steps."""
        found = [list(rows) for _, rows in groupby(zip(self.timesteps, self.bits, strict=True), key=itemgetter(1))]
        return [(rows[0][0], rows[-1][0], rows[0][1], len(rows)) for rows in found]


@dataclass(frozen=True)
class LayerWidth:
    """Why a layer's weight, or its input, has its width.

    Attributes: size: how many numbers a weight holds, how many products read an input; sensitivity: error of predictions by width,
        where all of them at the plan's own width make about 1.
    """

    name: str
    size: int
    bits: int
    sensitivity: Mapping[int, float]


@dataclass(frozen=True)
class StageCost:
    """Wall seconds that a stage took over all its records, and the peak memory of the process by then, bytes."""

    stage: str
    seconds: float
    peak_memory: float


@dataclass(frozen=True)
class Story:
    """All that the page shows of one run."""

    recipe: Mapping[str, JSON]
    plan: tuple[LayerGrids, ...]
    identity: Mapping[str, JSON]
    layer_widths: Sequence[LayerWidth]
    input_widths: Sequence[LayerWidth]
    widths: StepWidths | None
    equalized: Sequence[EqualizedLayer]
    choices: Mapping[str, Sequence[Choice]]
    losses: Sequence[UnitLoss]
    scores: Sequence[Score]
    noise: NoiseFit | None
    costs: Sequence[StageCost]

    @property
    def bits(self) -> str:
        """As in W4A8, W4A4/8 where the width changes by step, or W(2 to 8, mean 3.0)A4 where it changes by layer."""
        mixed = self.recipe.get("mixed")
        weights = _mean_text(self.layer_widths) or str(self.recipe["weights"])
        steps = "/".join(map(str, mixed["bits"] if mixed else [self.recipe["activations"]]))
        return f"W{weights}A{_mean_text(self.input_widths) or steps}"

    @property
    def seconds(self) -> float | None:
        """Wall seconds of the whole quantization, None if nothing was timed."""
        return sum(cost.seconds for cost in self.costs) if self.costs else None


def read_story(folder: Path) -> Story:
    """Read the run inside a checkpoint folder.

    Raises: RunError if there is none or a record is damaged; UsageError if its plan cannot be understood.
    """
    run = Run.read(folder / RUN_FOLDER)
    finished = run.finished()
    asked = ResolvedPlan.parse(run.identity["plan"], where=f"the plan of {run.folder}")
    layer_widths, input_widths = (_layer_widths(run, finished, stage) for stage in ("allocate", "allocate-inputs"))
    plan = with_weights(asked, {layer.name: layer.bits for layer in layer_widths})
    plan = with_inputs(plan, {layer.name: layer.bits for layer in input_widths})
    return Story(
        recipe=run.identity["recipe"],
        plan=plan.layers,
        identity=run.identity,
        layer_widths=layer_widths,
        input_widths=input_widths,
        widths=_widths(run, finished),
        equalized=_equalized(run, finished),
        choices=_choices(run, finished, plan.layers),
        losses=_losses(run, finished),
        scores=[Score(n, float(_only(run, name).meta["fd"])) for n, name in _rounds(finished, "score")],
        noise=_noise(run, finished),
        costs=_costs(run, finished),
    )


def weight_bytes(folder: Path) -> int | None:
    """Bytes of the quantized denoiser's weight files in a checkpoint, None if there are none."""
    configs = (path for path in folder.glob("*/config.json") if '"quantization_config"' in path.read_text("utf-8"))
    sizes = [file.stat().st_size for config in configs for file in config.parent.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _mean_text(layers: Sequence[LayerWidth]) -> str:
    """The widths of layers in a few words, and their mean; empty where none chose."""
    if not layers:
        return ""
    widths, count = [layer.bits for layer in layers], sum(layer.size for layer in layers)
    mean = sum(layer.bits * layer.size for layer in layers) / count
    return f"({min(widths)} to {max(widths)}, mean {mean:.1f})"


def _layer_widths(run: Run, finished: Sequence[str], stage: str) -> list[LayerWidth]:
    if stage not in finished:
        return []
    record = _only(run, stage)
    columns = (record.tensors[name].tolist() for name in ("sizes", "bits", "sensitivity"))
    return [
        LayerWidth(name, size, bits, dict(zip(record.meta["widths"], costs, strict=True)))
        for name, size, bits, costs in zip(record.meta["layers"], *columns, strict=True)
    ]


def _widths(run: Run, finished: Sequence[str]) -> StepWidths | None:
    if "widths" not in finished:
        return None
    record = _only(run, "widths")
    tables, timesteps = record.tensors, record.tensors["timesteps"]
    steps, call = timesteps.unique(return_inverse=True)  # ascending; the two calls of guidance have one timestep
    calls = [call == step for step in range(len(steps))]
    forward = torch.stack([tables["forward"][of].amin() for of in calls])
    least = torch.stack([tables["quantized"][:, of].amin(1) for of in calls], dim=1)
    return StepWidths(
        steps.flip(0).tolist(),
        tables["bits"][_groups(run, timesteps, steps.flip(0))].tolist(),
        forward.flip(0).tolist(),
        dict(zip(record.meta["widths"], least.flip(1).tolist(), strict=True)),
    )


def _groups(run: Run, timesteps: Tensor, of: Tensor) -> Tensor:
    """The step group of some timesteps, int64 [n], where calibration had the others."""
    groups = StepGroups.of(run.identity["recipe"]["step_groups"], timesteps.tolist())
    return torch.searchsorted(torch.tensor(groups.boundaries), of.float(), right=True)


def _equalized(run: Run, finished: Sequence[str]) -> list[EqualizedLayer]:
    if not {"observe", "equalize"} <= set(finished):
        return []
    ranges, vectors = _only(run, "observe"), _only(run, "equalize").tensors
    steps = ranges.tensors["timesteps"]
    return [EqualizedLayer(name, steps, channel_maxima(ranges, name), r) for name, r in vectors.items()]


def _choices(run: Run, finished: Sequence[str], plan: Sequence[LayerGrids]) -> dict[str, list[Choice]]:
    """Of the layers whose plan leaves the choice to the data."""
    if "select" not in finished:
        return {}
    free = [layer.name for layer in plan if any(grid.code == "adaptive" for grid in layer.inputs)]
    rows = _only(run, "select").meta["choices"]
    fields = ("group", "use_log2", "ratio", "error_even", "error_log2")
    return {name: [Choice(**{field: row[field] for field in fields}) for row in rows[name]] for name in free}


def _losses(run: Run, finished: Sequence[str]) -> list[UnitLoss]:
    """Of every unit in every round; the fit of the whole denoiser counts to the last one."""
    rounds = _rounds(finished, "reconstruct")
    if "network" in finished:
        rounds.append((rounds[-1][0] if rounds else 0, "network"))
    return [
        UnitLoss(str(r.meta["unit"]), n, float(r.meta["loss_before"]), float(r.meta["loss_after"]))
        for n, name in rounds
        for _, r in run.results(name)
    ]


def _noise(run: Run, finished: Sequence[str]) -> NoiseFit | None:
    if "correct" not in finished:
        return None
    tables, timesteps = _only(run, "correct").tensors, _only(run, "observe").tensors["timesteps"]
    row = _groups(run, timesteps, timesteps)
    tried: Mapping[str, JSON] = (
        _only(run, "temper").meta if "temper" in finished else {"strengths": [], "errors": [], "kept": 1.0}
    )
    return NoiseFit(
        timesteps.tolist(),
        tables["slope"][row].tolist(),
        tables["bias"][row].square().mean(dim=1).sqrt().tolist(),
        [(strength, error**0.5) for strength, error in zip(tried["strengths"], tried["errors"], strict=True)],
        tried["kept"],
    )


def _costs(run: Run, finished: Sequence[str]) -> list[StageCost]:
    """In the order in which the stages were done, which is that of the file of timings."""
    parts: dict[str, list[dict[str, float]]] = {}
    for file, entry in run.timings().items():
        parts.setdefault(file if file in finished else file.rpartition("/")[0], []).append(entry)
    return [
        StageCost(stage, sum(e["seconds"] for e in entries), max(e["peak_memory"] for e in entries))
        for stage, entries in parts.items()
    ]


def _rounds(finished: Sequence[str], stage: str) -> list[tuple[int, str]]:
    numbers = (name.removeprefix(f"{stage}/") for name in finished if name.startswith(f"{stage}/"))
    return sorted((int(number), f"{stage}/{number}") for number in numbers)


def _only(run: Run, name: str) -> Record:
    return next(record for _, record in run.results(name))


def spread(values: Tensor) -> tuple[float, float, float]:
    """Smallest, median and largest."""
    low, middle, high = torch.quantile(values.double(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)).tolist()
    return low, middle, high
