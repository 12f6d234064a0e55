"""The pace of a run: what the time left goes by."""

from __future__ import annotations

import pytest

from moka_jax.train import clock
from moka_jax.train.clock import RECENT, Clock


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch):
    """A clock that goes on only when it is told to."""
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def laps(timer: Clock, wait, *seconds: float) -> list[tuple[float, float]]:
    """What each lap of one step over 60 tokens tells."""
    found = []
    for each in seconds:
        wait(each)
        timer.count(60)
        found.append(timer.lap())
    return found


def test_the_pace_is_that_of_the_last_laps_without_the_one_that_compiles(wait) -> None:
    timer = Clock(before=7.0)
    assert laps(timer, wait, 30.0, 2.0, 4.0) == [(2.0, None), (30.0, 2.0), (15.0, 3.0)]
    assert laps(timer, wait, *[1.0] * RECENT)[-1] == (60.0, 1.0)
    assert timer.seconds == 7.0 + 36.0 + RECENT


def test_a_lap_of_several_steps_weighs_as_many_and_pauses_none(wait) -> None:
    timer = Clock(before=0.0)
    laps(timer, wait, 9.0, 1.0)
    for _ in range(3):
        wait(3.0)
        timer.count(10)
    with timer.pause():
        wait(100.0)
    assert timer.lap() == (30 / 9, (1.0 + 9.0) / 4)
