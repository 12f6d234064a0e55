"""How long a run takes."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator

RECENT = 10  # laps whose pace the time left goes by


class Clock:
    """Seconds of the whole run, tokens a second since the last lap, and the pace of the last laps, pauses left out.

    Args:
        before: seconds that the run had taken when it was stopped.
    """

    def __init__(self, *, before: float) -> None:
        self._start = time.perf_counter() - before
        self._lap_start = time.perf_counter()
        self._tokens = self._steps = 0
        self._laps: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._compiling = True

    @property
    def seconds(self) -> float:
        """Since the run began, the time between an interruption and the next start left out."""
        return time.perf_counter() - self._start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that counts for no lap."""
        begin = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - begin

    def count(self, tokens: int) -> None:
        """Note a step over this many tokens."""
        self._tokens += tokens
        self._steps += 1

    def lap(self) -> tuple[float, float | None]:
        """Tokens a second since the last lap, and seconds a step over the last `RECENT` ones.

        The first lap, in which steps are compiled, says nothing of the pace: None.
        """
        now = time.perf_counter()
        seconds = now - self._lap_start
        pace = None
        if not self._compiling:
            self._laps.append((seconds, self._steps))
            pace = sum(lap[0] for lap in self._laps) / sum(lap[1] for lap in self._laps)
        self._compiling = False
        rates = self._tokens / seconds, pace
        self._lap_start, self._tokens, self._steps = now, 0, 0
        return rates
