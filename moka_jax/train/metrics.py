"""The metrics of a run: one JSON object a line, and a picture of the losses.

Every record has a kind and a step:

| kind | what it tells |
|---|---|
| start | the run began, or went on, after this step: versions of the packages, devices, processes |
| data | the examples of a split: how many, how many tokens, how many of them learned, how many cut |
| train | a step: loss, learning rate, gradient norm before clipping, learned tokens, tokens a second, skipped so far |
| skip | a step that changed nothing, and why; only steps that `log_every` lets through have a record |
| eval | the held-out loss after a step |
| gates | softmax(gate_logits) of every layer, before the first step and after every `checkpoint_every` of them |
| fallback | the run went on from this step, since the newer checkpoints that are named were damaged |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moka_core import DataError

KINDS = ("start", "data", "train", "skip", "eval", "gates", "fallback")


class MetricsLog:
    """A metrics file that a run appends to.

    Holds: every line is complete and on disk as far as the operating system is concerned; no step stands
    twice, but for the starts.

    Args:
        path: the file.
        resume_from: keep the lines of steps up to this one; None starts the file anew.
        write: False keeps the records in memory only, for the processes of a run that write nothing.

    Raises:
        DataError: a line that should be kept is no metrics record, or the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_from: int | None, write: bool = True) -> None:
        self.path = path
        self._writes = write
        kept = []
        if resume_from is not None and path.exists():
            kept = [r for r in read_metrics(path, allow_cut_end=True) if r["step"] <= resume_from]
        self.records: list[dict[str, Any]] = kept
        if not write:
            return
        fresh = path.with_name(path.name + ".new")
        try:
            fresh.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise DataError(
                f"{path}: the metrics cannot be written: {error}; nothing was lost: make room on the disk, start again"
            ) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; its numbers must be finite.

        Raises:
            OSError: the disk is full, or the like; part of the line may stand in the file.
        """
        line = _line(record)
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        self.records.append(dict(record))

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest record of a kind, if there is one."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), None)


def read_metrics(path: str | Path, *, allow_cut_end: bool = False) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; each has at least "kind" and "step".

    Args:
        allow_cut_end: leave out a last line without an end, which a killed run can leave behind.

    Raises:
        DataError: the file cannot be read, or a line is no record.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a metrics file that can be read; {error}") from error
    lines = text.split("\n")
    if lines[-1] and not allow_cut_end:
        raise DataError(f"{path}:{len(lines)}: the last line is cut off; resume the run, or delete that line")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg}; delete that line") from None
        if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("step"), int):
            raise DataError(
                f"{path}:{number}: expected an object with a kind of {', '.join(KINDS)} and a step; got {line[:60]}"
            )
        records.append(record)
    return records


def plot_losses(metrics: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw the training and the held-out loss over the steps into an image file (.png, .svg, .pdf).

    Args:
        metrics: records of `read_metrics`.
        path: the image; its ending chooses the format.

    Raises:
        DataError: there is no loss to draw.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    draw_losses(metrics, figure.add_subplot())
    figure.savefig(path, dpi=150)


def draw_losses(metrics: Iterable[Mapping[str, Any]], axes: Axes) -> None:
    """Draw the same into axes of matplotlib's."""
    records = list(metrics)
    drawn = 0
    for kind, label, style in (("train", "training", "-"), ("eval", "held out", "o-")):
        points = [(record["step"], record["loss"]) for record in records if record["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
            drawn += len(points)
    if not drawn:
        raise DataError("plot_losses: expected at least one train or eval record; got none")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
