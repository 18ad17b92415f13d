"""Tensors in memory and on disk are the same; the budget is kept, and nothing stays behind."""

from __future__ import annotations

import ctypes
import gc
import math
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tcaq.allocator import release_freed_memory
from tcaq.errors import RunError
from tcaq.models.conditioning import Conditioning
from tcaq.models.inputs import Inputs
from tcaq.models.store import Store
from tcaq.models.trajectories import Trajectories, predict, recording
from tcaq.records import Record
from tcaq.spec.law import Active
from tcaq.stages.collect import GIVEN, trajectories_of
from tcaq.stages.draw import draw_parts
from tcaq.stages.weigh import weigh

STATUS = Path("/proc/self/status")
MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (), (0, 2)])
def test_what_is_kept_on_disk_equals_what_is_kept_in_memory(dtype, shape, tmp_path):
    value = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    turned = value.transpose(0, -1) if value.dim() > 1 else value
    for store in (Store(), Store(0, tmp_path)):
        found = store.keep(turned)
        assert found.dtype == dtype
        assert torch.equal(found, turned)
        assert found.is_contiguous()
        assert found.data_ptr() != value.data_ptr() or not value.numel()
        if value.dim():
            whole = store.gather(iter(turned), turned.shape, turned)
            assert torch.equal(whole, turned)
    assert not list(tmp_path.iterdir())


def test_memory_counts_as_long_as_it_is_held(tmp_path):
    store = Store(100, tmp_path)
    first, beyond = store.keep(torch.zeros(20)), store.keep(torch.zeros(20))
    assert store.used == 80
    assert torch.equal(first, beyond)
    view = first[3:]
    del first
    assert store.used == 80
    del view
    gc.collect()
    assert store.used == 0
    again = store.keep(torch.zeros(25))
    assert store.used == 100
    assert len(again) == 25


@pytest.mark.parametrize("budget", [0, 10**6])
def test_pieces_of_another_size_are_refused(budget, tmp_path):
    with pytest.raises((ValueError, RuntimeError)):
        Store(budget, tmp_path).gather([torch.zeros(3), torch.zeros(4)], (2, 3), torch.zeros(1))
    with pytest.raises(ValueError, match=r"3 elements do not make a tensor of shape \(2, 3\)"):
        Store(budget, tmp_path).gather([torch.zeros(3)], (2, 3), torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tcaq.models.store.torch.from_file", full)
    with pytest.raises(RunError, match=r"40 bytes.*No space left.*memory budget"):
        Store(0, tmp_path).keep(torch.zeros(10))
    assert not list(tmp_path.iterdir())


class Planted(nn.Module):
    """A denoiser that is given as much as is asked for, and answers nothing."""

    def forward(self, sample, timestep, text=None):
        return sample[..., :1]


CALLS, IMAGES = 8, 2
X, TEXT = MIB // 4, MIB // 16  # float32: 2 MiB of x_t a call, and half a MiB of text


def journey(store: Store, folder: Path) -> list[torch.Tensor]:
    """From recording to drawn batches, with two batches of images; some of what is seen on the way."""
    denoiser, parts = Planted(), []
    for batch in range(2):
        with recording(denoiser, IMAGES, store) as calls:
            for call in range(CALLS):
                generator = torch.Generator().manual_seed(CALLS * batch + call)
                x, text = (torch.empty(IMAGES, size).uniform_(generator=generator) for size in (X, TEXT))
                denoiser(x, torch.tensor(float(CALLS - call)), text=text)
        record = record_of(Trajectories.recorded(calls, store))
        del calls
        record.save(folder / f"{batch}.safetensors")
        parts.append(trajectories_of(Record.load(folder / f"{batch}.safetensors")))
    joined = Trajectories.join(parts, store)
    joined = weighted(joined)
    drawn = draw_parts(joined, CALLS * IMAGES, 0)[0].split(4)
    means = [torch.stack([inputs.sample.mean(1), inputs.rows["text"].mean(1)]) for inputs in (d[:] for d in drawn)]
    return [joined.shares, predict(denoiser, joined), *means]


def record_of(trajectories: Trajectories) -> Record:
    """As `collect` writes it."""
    argument = trajectories.conditioning.arguments["text"]
    tensors = {"samples": trajectories.samples, "timesteps": trajectories.timesteps}
    tensors |= {f"{GIVEN}|text|{i}": value for i, value in enumerate(argument.values)}
    entry = {"index": argument.index.tolist(), "by_image": True, "plain": [None] * len(argument.values)}
    return Record(tensors, {GIVEN: {"text": entry}})


def weighted(trajectories: Trajectories) -> Trajectories:
    weights = weigh(None, trajectories, Active()).tensors["weights"]
    return Trajectories(trajectories.samples, trajectories.timesteps, trajectories.conditioning, weights)


def own_memory() -> int:
    """Bytes of this process that no file stands for."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """How far the process's own memory grows while a block runs."""

    def __enter__(self):
        release_freed_memory()
        self.before = self.peak = own_memory()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self):
        while not self.ended.is_set():
            self.peak = max(self.peak, own_memory())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.peak - self.before


def watched(budget: float, spill: Path | None, folder: Path) -> tuple[int, list[np.ndarray]]:
    """How far memory grows on a journey, and what is seen on the way; to be called in a process of its own.

    What is freed goes back to the system at once there (M_MMAP_THRESHOLD, which the first large piece freed would raise); else the
    C library keeps pieces that no other tensor fits into, by chance and by what ran before.
    """
    torch.set_num_threads(1)
    if not ctypes.CDLL(None).mallopt(-3, 2**17):
        raise OSError("the C library cannot be told")
    with Watch() as watch:
        found = journey(Store(budget, spill), folder)
    return watch.grown, [part.numpy() for part in found]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the GNU C library, and Linux's account of memory"
)
def test_trajectories_of_a_planted_size_stay_within_the_budget(tmp_path):
    """40 MiB are recorded, saved, loaded, joined, weighed and drawn from, with a budget of 4."""
    planted = 2 * CALLS * IMAGES * (X + TEXT) * 4
    (tmp_path / "spilled").mkdir()
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        spilled, found = process.submit(watched, 4 * MIB, tmp_path / "spilled", tmp_path).result()
    assert not list((tmp_path / "spilled").iterdir())
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        held, expected = process.submit(watched, math.inf, None, tmp_path).result()
    assert held > planted  # the watch sees it
    # beside the budget: one call of the pipeline's own, a batch that is drawn, and their temporary copies
    assert spilled < 4 * MIB + 16 * MIB
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_conditions_that_come_again_are_kept_once(tmp_path):
    text, store = torch.randn(2, 5), Store(0, tmp_path)
    denoiser = Planted()
    with recording(denoiser, 2, store) as calls:
        for t in (3.0, 2.0, 1.0):
            denoiser(torch.randn(2, 4), torch.tensor(t), text=text.clone())
        text += 1  # a pipeline may work in place
        denoiser(torch.randn(2, 4), torch.tensor(0.0), text=text)
    assert len({id(call.rows["text"]) for call in calls}) == 2
    argument = Conditioning.recorded(calls).arguments["text"]
    assert argument.index.tolist() == [0, 0, 0, 1]
    assert torch.equal(argument.values[1], argument.values[0] + 1)
    assert isinstance(calls[0], Inputs)
