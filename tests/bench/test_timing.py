"""Interleaved timing, with a clock that the test winds."""

from __future__ import annotations

from tcaq.bench import timing


def test_calls_take_turns_and_the_median_of_each_counts(monkeypatch) -> None:
    now, order = [0.0], []
    lasting = {"a": iter([50.0, 1.0, 9.0, 2.0]), "b": iter([50.0, 5.0, 5.0, 4.0])}

    def call(name):
        def run():
            order.append(name)
            now[0] += next(lasting[name])

        return run

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    found = timing.interleaved({name: call(name) for name in "ab"}, repeat=3)
    assert found == {"a": 2.0, "b": 5.0}  # the first run of each, unmeasured, took 50
    assert order == list("abababab")
