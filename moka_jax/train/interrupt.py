"""A polite stop: the first signal is noted, and acted upon between two steps; the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, the first of the signals sets `requested` and the next one raises KeyboardInterrupt.

    A step gives away the buffers of the state before it, so stopping in the middle of one would leave nothing to
    save. Outside of the main thread, where Python delivers no signals, only `request` has an effect.

    Args:
        on_request: called once, when the stop is requested.
        signals: what to listen to; Ctrl-C, and what schedulers and `kill` send before they end a process.
    """

    def __init__(
        self,
        on_request: Callable[[], None],
        *,
        signals: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
    ) -> None:
        self.requested = False
        self._on_request = on_request
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}

    def request(self) -> None:
        """Ask for a stop after the step that is under way."""
        if not self.requested:
            self.requested = True
            self._on_request()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.request()
