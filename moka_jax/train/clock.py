"""How long a run takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds of the whole run, and tokens and steps a second since the last lap, pauses left out.

    Args:
        before: seconds that the run had taken when it was stopped.
    """

    def __init__(self, *, before: float) -> None:
        self._start = time.perf_counter() - before
        self._lap_start = time.perf_counter()
        self._tokens = self._steps = 0

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

    def lap(self) -> tuple[float, float]:
        """Tokens a second and seconds a step since the last lap."""
        now = time.perf_counter()
        seconds = now - self._lap_start
        rates = self._tokens / seconds, seconds / self._steps
        self._lap_start, self._tokens, self._steps = now, 0, 0
        return rates
