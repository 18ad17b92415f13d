"""The protocol of the benchmark: build every contender, time them in turn, compare their images with the float model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel, ConfigDict

from tcaq.bench.contenders import CONTENDERS, Bout, Contender
from tcaq.bench.memory import peak_memory
from tcaq.bench.timing import interleaved
from tcaq.errors import TcaqError, UsageError
from tcaq.evaluate.evaluate import versions
from tcaq.evaluate.metrics import psnr
from tcaq.layers.hold import holding_weights
from tcaq.models.denoiser import find_denoiser
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.processor import has_vnni, processor

FLOAT = "fp32"
PURPOSE = "bench"
TIMESTEP = 500


class Settings(BaseModel):
    """What is measured.

    batches: images at a time; size: height and width (None: the model's own); repeat: timed repetitions; steps, images: of the
    samples compared with float; memory: whether peak memory is measured, each contender in a process of its own.
    """

    model_config = ConfigDict(frozen=True)

    batches: tuple[int, ...] = (1, 8)
    size: int | None = None
    repeat: int = 5
    steps: int = 10
    images: int = 4
    memory: bool = False


class Row(BaseModel):
    """One contender.

    seconds: median seconds of one step, by batch size; psnr: mean over images against the float model's, dB; memory: peak bytes
    while sampling beyond what the process held before it loaded the model; size: bytes of the denoiser on disk; problem: why it
    did not run.
    """

    name: str
    seconds: dict[int, float] = {}
    psnr: float | None = None
    memory: int | None = None
    size: int | None = None
    problem: str | None = None


class Benchmark(BaseModel):
    """All rows with what they depend on; `model_dump_json()` is the file that is written."""

    settings: Settings
    rows: tuple[Row, ...]
    processor: str
    vnni: bool
    threads: int
    versions: dict[str, str]


def check_names(names: Sequence[str]) -> None:
    """Raises: UsageError naming contenders that are not known."""
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise UsageError(f"unknown contenders: {', '.join(unknown)}; known: {', '.join(CONTENDERS)}")


def benchmark(bout: Bout, names: Sequence[str], settings: Settings, note: Callable[[str], None]) -> Benchmark:
    """Measure contenders by name; one that cannot run says why in its row.

    Raises: UsageError naming contenders that are not known.
    """
    check_names(names)
    bout.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in dict.fromkeys((FLOAT, *names)):
        note(f"building {name}")
        found[name] = _build(bout, name, settings)
    built = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    seconds = {batch: _time(built, batch, settings) for batch in settings.batches}
    likeness = _compare(built, settings)

    def row(name: str, contender: Contender | str) -> Row:
        if isinstance(contender, str):
            return Row(name=name, problem=contender)
        times = {batch: of[name] for batch, of in seconds.items()}
        memory = peak_memory(bout, name, max(settings.batches), settings.steps) if settings.memory else None
        return Row(name=name, seconds=times, psnr=likeness.get(name), memory=memory, size=contender.size)

    return Benchmark(
        settings=settings, rows=tuple(row(*pair) for pair in found.items()), processor=processor(), vnni=bool(has_vnni()),
        threads=torch.get_num_threads(), versions=versions(),
    )  # fmt: skip


def _build(bout: Bout, name: str, settings: Settings) -> Contender | str:
    """A contender that runs on all that is coming, or what kept it from that."""
    try:
        with redirect_stdout(StringIO()), torch.no_grad():  # tools talk while they work
            contender = CONTENDERS[name](bout)
            for batch in {*settings.batches, settings.images}:
                _step(contender.pipe, batch, settings.size if batch in settings.batches else None)()
        return contender
    except TcaqError as error:
        return str(error)
    except Exception as error:  # a tool that fails on this model must not end the run of the others
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _time(built: dict[str, Contender], batch: int, settings: Settings) -> dict[str, float]:
    with torch.no_grad(), ExitStack() as stack:
        for contender in built.values():
            stack.enter_context(holding_weights(find_denoiser(contender.pipe)[1]))
        steps = {name: _step(contender.pipe, batch, settings.size) for name, contender in built.items()}
        return interleaved(steps, settings.repeat)


def _step(pipe: DiffusionPipeline, batch: int, size: int | None) -> Callable[[], object]:
    """A call of the denoiser on noise of a height and width (None: the model's own)."""
    denoiser = cast(Any, find_denoiser(pipe)[1])
    own = size or denoiser.config.sample_size
    shape = (own, own) if isinstance(own, int) else tuple(own)
    x = torch.randn(batch, denoiser.config.in_channels, *shape, generator=torch.Generator().manual_seed(0))
    return lambda: denoiser(x, torch.tensor(TIMESTEP))


def _compare(built: dict[str, Contender], settings: Settings) -> dict[str, float]:
    seeds = image_seeds(PURPOSE, 0, 0, settings.images)
    images = {name: sample(contender.pipe, seeds, settings.steps) / 255 for name, contender in built.items()}
    return {name: float(psnr(found, images[FLOAT]).mean()) for name, found in images.items() if name != FLOAT}
