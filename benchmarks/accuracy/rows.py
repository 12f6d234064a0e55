"""The rows of the study: a file of JSON lines that runs are added to, and what they say of the learning rates."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.accuracy.methods import METHODS
from benchmarks.harness import RESULTS
from moka_core import DataError

ROWS = RESULTS / "accuracy_smollm2-135m.jsonl"
BASE = "base"  # the method of the rows of the model without an adapter
LADDER = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))  # of learning rates
MOST_TRIES = 5
Rows = Sequence[dict[str, Any]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; none if there is no file yet. A last line that was cut off is left out.

    Raises:
        DataError: another line is no row, or a run has two rows.
    """
    rows = []
    whole = _whole(path)
    for number, line in enumerate(whole.decode().splitlines()):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}: line {number + 1}: expected a row in JSON; {error}") from error
    names = ("task", "method", "split", "rate", "seed")
    runs = [tuple(row[name] for name in names) for row in rows]
    twice = sorted({run for run in runs if runs.count(run) > 1})
    if twice:
        raise DataError(f"{path}: expected a row a run; {dict(zip(names, twice[0], strict=True))} has several")
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on the disk when this returns; what was cut off of an earlier one goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.truncate(len(_whole(path)))
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path) -> bytes:
    """The file's whole lines."""
    found = path.read_bytes() if path.exists() else b""
    return found[: found.rfind(b"\n") + 1]


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep other studies off the file.

    Raises:
        DataError: one is at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path.with_suffix(".lock")).acquire(timeout=0)
    except Timeout:
        raise DataError(f"{path}: another study adds rows to it; wait for it, or give another --rows") from None
    with lock:  # it is let go at the end; entering does not take it once more
        yield


def next_rates(rows: Rows, task: str, method: str) -> tuple[list[float], float | None]:
    """(the learning rates to try next on validation, the one that was chosen once there are none).

    First the method's own three; then, while the best is the largest or the smallest of those tried, the one beyond it,
    up to `MOST_TRIES`: the same rule for each method, so that each one's best stands between worse ones. The best has
    the least loss of the right answers; a loss that is no number is worse than any.
    """
    tried = {
        row["rate"]: row["loss"] if math.isfinite(row["loss"]) else math.inf
        for row in rows
        if (row["task"], row["method"], row["split"], row["seed"]) == (task, method, "validation", 0)
    }
    first = [rate for rate in METHODS[method].rates if rate not in tried]
    if first:
        return first, None
    best = min(sorted(tried), key=lambda rate: tried[rate])
    beyond = {max(tried): 1, min(tried): -1}.get(best, 0)
    if beyond and len(tried) < MOST_TRIES:
        nearest = min(range(len(LADDER)), key=lambda at: abs(math.log(LADDER[at] / best)))
        return [LADDER[nearest + beyond]], None
    return [], best
