"""Evaluation images of any number, after any other number: those of a fresh run, and nothing that was sampled is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tcaq.errors import RunError
from tcaq.evaluate import sampling
from tcaq.evaluate.sampling import sample_for_evaluation
from tcaq.models.sampler import sample
from tcaq.models.seeds import image_seeds
from tcaq.runs import Run, silent


class Sampler:
    """In place of `sample`: images that show their seed, and how many were sampled together."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.left = 1000  # batches until it is interrupted

    def __call__(self, pipe: Any, seeds: list[int], steps: int, conditions: Any, first: int) -> Tensor:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.calls.append((first, first + len(seeds)))
        rows = [[seed % 251, seed // 251 % 251, len(seeds)] for seed in seeds]
        return torch.tensor(rows, dtype=torch.uint8)[:, None, None]


@pytest.fixture
def sampler(monkeypatch):
    sampler = Sampler()
    monkeypatch.setattr(sampling, "sample", sampler)
    return sampler


@pytest.fixture
def pipe(tiny_pipeline):
    return tiny_pipeline()


def sampled(pipe: Any, work: Path, num: int, batch: int = 4, on_progress: Any = silent) -> sampling.Sampled:
    return sample_for_evaluation(pipe, work, num=num, steps=1, seed=3, batch=batch, on_progress=on_progress)


def files(work: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in work.rglob("*.safetensors")}


def expected(num: int, batch: int = 4) -> list[list[int]]:
    """What `Sampler` draws in a fresh run."""
    seeds = image_seeds("evaluation", 3, 0, num)
    return [[seed % 251, seed // 251 % 251, min(batch, num - i // batch * batch)] for i, seed in enumerate(seeds)]


def test_any_number_after_any_other_is_that_of_a_fresh_run(pipe, tmp_path, sampler):
    before: dict[Path, bytes] = {}
    for num in (10, 4, 3, 9, 10, 14, 12, 1, 18, 10):
        found = sampled(pipe, tmp_path, num)
        assert found.images.reshape(num, 3).tolist() == expected(num)
        after = files(tmp_path)
        assert after.items() >= before.items(), f"{num} images removed or changed some"
        before = after
    whole, rests = [(0, 4), (4, 8), (8, 12), (12, 16)], [(8, 10), (0, 3), (8, 9), (12, 14), (0, 1), (16, 18)]
    assert sorted(sampler.calls) == sorted(whole + rests)  # each once


def test_growing_equals_a_fresh_run_of_a_quantized_model(quantized_tiny, tiny_pipeline, tmp_path):
    pipe = quantized_tiny(tiny_pipeline())
    for num in (7, 3, 9):
        grown, fresh = (sampled(pipe, work, num).images for work in (tmp_path / "grown", tmp_path / f"fresh-{num}"))
        assert torch.equal(grown, fresh)
    seeds = image_seeds("evaluation", 3, 0, 9)
    parts = [sample(pipe, seeds[i : i + 4], 1) for i in (0, 4, 8)]
    assert torch.equal(grown, torch.cat(parts))


def test_cost_is_that_of_the_images_that_were_asked_for(pipe, tmp_path, sampler):
    sampled(pipe, tmp_path, 10)
    (folder,) = tmp_path.iterdir()
    parts = [record.meta for _, record in Run.read(folder).results("images")]
    found = sampled(pipe, tmp_path, 8)
    assert found.seconds == sum(part["seconds"] for part in parts[:2])
    assert found.peak_memory == max(part["peak_memory"] for part in parts[:2])


def test_an_interruption_loses_at_most_a_batch_whatever_was_there(pipe, tmp_path, sampler):
    sampled(pipe, tmp_path, 6)
    sampler.left = 2
    with pytest.raises(KeyboardInterrupt):
        sampled(pipe, tmp_path, 19)
    sampler.left = 1000
    assert sampled(pipe, tmp_path, 6).images.reshape(6, 3).tolist() == expected(6)
    assert sampled(pipe, tmp_path, 19).images.reshape(19, 3).tolist() == expected(19)
    assert sampler.calls == [(0, 4), (4, 6), (4, 8), (8, 12), (12, 16), (16, 19)]


def test_progress_counts_the_batches_that_were_asked_for(pipe, tmp_path, sampler):
    seen: dict[int, list[tuple[int, int, bool]]] = {10: [], 4: [], 13: []}
    for num, calls in seen.items():
        sampled(pipe, tmp_path, num, on_progress=lambda stage, *how, calls=calls: calls.append(how))
    assert seen == {
        10: [(0, 3, False), (1, 3, False), (2, 3, False), (3, 3, False)],
        4: [(0, 1, False), (1, 1, True)],
        13: [(0, 4, False), (1, 4, True), (2, 4, True), (3, 4, False), (4, 4, False)],
    }


def test_another_size_of_batches_has_a_folder_of_its_own(pipe, tmp_path, sampler):
    sampled(pipe, tmp_path, 10)
    before = files(tmp_path)
    assert sampled(pipe, tmp_path, 10, batch=5).images.reshape(10, 3).tolist() == expected(10, batch=5)
    assert files(tmp_path).items() > before.items()
    assert sampled(pipe, tmp_path, 10).images.reshape(10, 3).tolist() == expected(10)
    assert sampler.calls == [(0, 4), (4, 8), (8, 10), (0, 5), (5, 10)]


def test_finished_images_are_read_while_another_process_samples_more(pipe, tmp_path, sampler):
    sampled(pipe, tmp_path, 10)
    (folder,) = tmp_path.iterdir()
    with Run.open(folder, Run.read(folder).identity):
        for num in (10, 8):
            assert sampled(pipe, tmp_path, num).images.reshape(num, 3).tolist() == expected(num)
        with pytest.raises(RunError, match="Another process is working"):
            sampled(pipe, tmp_path, 12)
    assert sampled(pipe, tmp_path, 12).images.reshape(12, 3).tolist() == expected(12)
