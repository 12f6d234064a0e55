"""Some steps of a run under JAX's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax

from moka_jax.train.config import Profile


class Profiler:
    """Records the steps that the settings name; a trace that is under way ends with the run.

    Args:
        settings: which steps; None for none.
        folder: where the trace goes.
    """

    def __init__(self, settings: Profile | None, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._running = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the work of one step, which is named in the trace; `finish` ends the trace."""
        settings = self._settings
        if settings is None or not settings.start <= number <= settings.last:
            yield
            return
        if not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finish(self, number: int, *results: jax.Array) -> bool:
        """After a step: end the trace if it was the last one to record, once its results are there; says if it did."""
        if not self._running or self._settings is None or number < self._settings.last:
            return False
        jax.block_until_ready(results)
        self._stop()
        return True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
