"""The metrics of a run for TensorBoard, beside the JSON lines."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moka_core import ConfigError

_FLUSH_SECONDS = 10
_SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "skipped")


def check_tensorboard() -> None:
    """Refuse a run that could not write.

    Raises:
        ConfigError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "tensorboard: expected the package tensorboardX; it is not installed; "
            "run: pip install tensorboardX, or set tensorboard: false"
        )


class TensorBoard:
    """An event file that a run appends to: train/loss, train/learning_rate, …, eval/loss.

    TensorBoardX's own SummaryWriter hands events to a thread, and waits for it forever if the disk is full; its file
    writer, which is used here, reports that.

    Args:
        folder: of the run's event files; made if it does not exist.
        first_step: what earlier files of the folder hold from this step on is no longer shown.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # the name has seconds only, and a run may be started twice within one
        self._file = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        self._flushed = time.monotonic()
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record of the metrics.

        Raises:
            OSError: the disk is full, or the like.
        """
        from tensorboardX.summary import scalar

        if record["kind"] in ("train", "eval"):
            for name in _SHOWN:
                if name in record:
                    self._write(record["step"], summary=scalar(f"{record['kind']}/{name}", record[name]))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # a full disk is reported once
        with contextlib.nullcontext() if kind is None else contextlib.suppress(OSError):
            self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write_event(Event(wall_time=time.time(), step=step, **what))
