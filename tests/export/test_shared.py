"""A batch shared out among threads is the batch."""

from threading import Barrier

import numpy as np
import pytest

from tcaq.export.shared import Shared


class Sessions:
    """Opens sessions that double images and add what all images share, and remembers who called them with how many."""

    def __init__(self, together: int = 1) -> None:
        """Args: together: calls that a session of one thread waits for, before any returns."""
        self.opened, self.calls, self.barrier = [], [], Barrier(together)

    def open(self, threads: int):
        self.opened.append(threads)

        def predict(images: np.ndarray, shift: np.ndarray) -> np.ndarray:
            if threads == 1:
                self.barrier.wait(timeout=20)
            self.calls.append((threads, len(images)))
            return 2 * images + shift

        return predict

    def shared(self, threads: int) -> Shared:
        return Shared(self.open(1), self.open, (True, False), threads)


@pytest.mark.parametrize(
    ("images", "threads", "shares"), [(8, 2, [4, 4]), (9, 2, [5, 4]), (7, 3, None), (8, 3, [3, 3, 2])]
)
def test_each_thread_computes_its_own_images_at_the_same_time(images, threads, shares) -> None:
    sessions = Sessions(together=threads)
    x, shift = np.random.default_rng(0).normal(size=(images, 3)), np.array([0.5, 0.25, 0.125])
    found = sessions.shared(threads)(x, shift)
    np.testing.assert_array_equal(found, 2 * x + shift)
    expected = [(threads, images)] if shares is None else [(1, share) for share in shares]
    assert sorted(sessions.calls, reverse=True) == expected


def test_few_images_have_all_threads_for_each_operator() -> None:
    sessions = Sessions()
    shared = sessions.shared(4)
    for images in (1, 2, 3):
        shared(np.zeros((images, 3)), np.zeros(3))
    assert sessions.calls == [(4, 1), (4, 2), (4, 3)]
    assert sessions.opened == [1, 4]


def test_one_thread_needs_no_second_session() -> None:
    sessions = Sessions()
    shared = sessions.shared(1)
    for images in (1, 2, 3):
        shared(np.zeros((images, 3)), np.zeros(3))
    assert sessions.opened == [1]
    assert [images for _, images in sessions.calls] == [1, 2, 3]


def test_a_session_is_opened_again_when_it_was_let_go() -> None:
    sessions = Sessions(together=2)
    shared = sessions.shared(2)
    for images in (2, 1, 2):
        shared(np.zeros((images, 3)), np.zeros(3))
    assert sessions.opened == [1, 2, 1]


def test_what_fails_in_a_thread_fails_outside() -> None:
    def fails(*arrays: np.ndarray) -> np.ndarray:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        Shared(fails, lambda threads: fails, (True,), 2)(np.zeros((4, 3)))


def test_inputs_without_rows_for_images_are_one_image() -> None:
    sessions = Sessions()
    shared = Shared(sessions.open(1), sessions.open, (False, False), 2)
    shared(np.zeros((6, 3)), np.zeros(3))
    assert sessions.calls == [(2, 6)]
