"""The protocol of the benchmark: build every contender, time them in turn, compare their images with the float model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from io import StringIO

import torch
from pydantic import BaseModel, ConfigDict

from tcaq.bench.bout import Bout
from tcaq.bench.calls import Arguments, call_of, ready
from tcaq.bench.contenders import CONTENDERS, Contender
from tcaq.bench.memory import peak_memory
from tcaq.bench.timing import interleaved
from tcaq.checkpoint import load
from tcaq.errors import ModelError, TcaqError, UsageError
from tcaq.evaluate.evaluate import versions
from tcaq.evaluate.metrics import psnr
from tcaq.layers.hold import holding_weights
from tcaq.models.denoiser import find_denoiser
from tcaq.models.load import weights_hash
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.processor import has_vnni, processor
from tcaq.records import read_json, write_json
from tcaq.spec.conditions import Conditions

FLOAT = "fp32"
MADE_OF = "made-of.json"
PURPOSE = "bench"


class Settings(BaseModel):
    """What is measured.

    batches: images at a time; size: height and width in pixels (None: the model's own); repeat: timed repetitions; steps,
    images: of the samples compared with float; memory: whether peak memory is measured, each contender in a process of its own.
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

    seconds: median seconds of one call of the denoiser, by images at a time; psnr: mean over images against the float model's, dB;
    memory: peak bytes while sampling beyond what the process held before it loaded the model; size: bytes of the denoiser on
    disk; problem: why it did not run, or why its memory is not known.
    """

    name: str
    seconds: dict[int, float] = {}
    psnr: float | None = None
    memory: int | None = None
    size: int | None = None
    problem: str | None = None


class Benchmark(BaseModel):
    """All rows with what they depend on; `model_dump_json()` is the file that is written.

    calls_a_step: of the denoiser in a step of sampling: more than one where guidance makes a second one, or the scheduler does.
    """

    settings: Settings
    rows: tuple[Row, ...]
    calls_a_step: float = 1.0
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

    Raises: UsageError naming contenders that are not known, or what else is wrong; ModelError if the float model does not run.
    """
    check_names(names)
    claim_folder(bout)
    calls = _calls(bout, settings)
    found = {}
    for name in dict.fromkeys((FLOAT, *names)):
        note(f"building {name}")
        found[name] = _build(bout, name, calls)
    if isinstance(found[FLOAT], str):
        raise ModelError(f"the float model {bout.model} does not run: {found[FLOAT]}")
    built = {name: contender for name, contender in found.items() if isinstance(contender, Contender)}
    seconds = {batch: _time(built, calls[batch], settings.repeat) for batch in settings.batches}
    likeness, calls_a_step = _compare(built, settings, bout.conditions)

    def row(name: str, contender: Contender | str) -> Row:
        if isinstance(contender, str):
            return Row(name=name, problem=contender)
        times = {batch: of[name] for batch, of in seconds.items()}
        memory = peak_memory(bout, name, max(settings.batches), settings.steps) if settings.memory else None
        found, problem = (None, memory) if isinstance(memory, str) else (memory, None)
        return Row(
            name=name, seconds=times, psnr=likeness.get(name), memory=found, size=contender.size, problem=problem
        )

    return Benchmark(
        settings=settings, rows=tuple(row(*pair) for pair in found.items()), calls_a_step=calls_a_step,
        processor=processor(), vnni=bool(has_vnni()), threads=torch.get_num_threads(), versions=versions(),
    )  # fmt: skip


def claim_folder(bout: Bout) -> None:
    """Make the folder for what is built, and note in it what that is made of.

    Raises: UsageError if it holds what was made of something else.
    """
    bout.work.mkdir(parents=True, exist_ok=True)
    path, made_of = bout.work / MADE_OF, {
        "checkpoint": weights_hash(find_denoiser(load(bout.folder))[1]),
        "model": weights_hash(find_denoiser(bout.load_float())[1]),
        "vnni": bool(has_vnni()),
    }  # fmt: skip
    if any(bout.work.iterdir()) and not (path.exists() and read_json(path) == made_of):
        raise UsageError(
            f"{bout.work} holds other things, or what was built of another model or on another processor; give another --work"
        )
    write_json(path, made_of)


def _calls(bout: Bout, settings: Settings) -> dict[int | None, Arguments]:
    """The timed call by number of images, and under None that of the images that are compared."""
    pipe = bout.load_float()
    calls: dict[int | None, Arguments] = {None: call_of(pipe, settings.images, None, bout.conditions)}
    return calls | {batch: call_of(pipe, batch, settings.size, bout.conditions) for batch in settings.batches}


def _build(bout: Bout, name: str, calls: Mapping[int | None, Arguments]) -> Contender | str:
    """A contender that runs on all that is coming, or what kept it from that."""
    try:
        with redirect_stdout(StringIO()), torch.no_grad():  # tools talk while they work
            contender = CONTENDERS[name](bout)
            for arguments in calls.values():
                ready(find_denoiser(contender.pipe)[1], arguments)()
        return contender
    except TcaqError as error:
        return str(error)
    except Exception as error:  # a tool that fails on this model must not end the run of the others
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _time(built: dict[str, Contender], arguments: Arguments, repeat: int) -> dict[str, float]:
    denoisers = {name: find_denoiser(contender.pipe)[1] for name, contender in built.items()}
    with torch.no_grad(), ExitStack() as stack:
        for denoiser in denoisers.values():
            stack.enter_context(holding_weights(denoiser))
        return interleaved({name: ready(denoiser, arguments) for name, denoiser in denoisers.items()}, repeat)


def _compare(
    built: dict[str, Contender], settings: Settings, conditions: Conditions | None
) -> tuple[dict[str, float], float]:
    """PSNR of each contender's images to the float model's, and how often that calls its denoiser in a step."""
    seeds, calls = image_seeds(PURPOSE, 0, 0, settings.images), list[int]()
    handle = find_denoiser(built[FLOAT].pipe)[1].register_forward_pre_hook(lambda *_: calls.append(1))
    images = {
        name: sample(contender.pipe, seeds, settings.steps, conditions) / 255 for name, contender in built.items()
    }
    handle.remove()
    likeness = {name: float(psnr(found, images[FLOAT]).mean()) for name, found in images.items() if name != FLOAT}
    return likeness, len(calls) / settings.steps
