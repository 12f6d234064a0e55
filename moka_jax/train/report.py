"""What a run shows while it trains: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Report:
    """Progress of a run on a console.

    Args:
        console: where to show it; a bar if it is a terminal, otherwise a line for each record.
        steps: steps of the run.
        done: steps that were finished before.
    """

    def __init__(self, console: Console, *, steps: int, done: int) -> None:
        self._console = console
        self._steps = steps
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=16),  # all columns fit 80 characters
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> Report:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Show one line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Note that a step is finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def train(self, record: dict[str, Any], *, seconds_left: float | None) -> None:
        """Show a training record of the metrics, and how long the rest will take, if that is known."""
        numbers = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["skipped"]:
            numbers += f"  {record['skipped']} skipped"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], numbers=numbers)
        else:
            left = "" if seconds_left is None else f"  left {_duration(seconds_left)}"
            self.say(
                f"step {record['step']}/{self._steps}  {numbers}  learning rate {record['learning_rate']:.3g}{left}"
            )

    def skip(self, record: dict[str, Any]) -> None:
        """Show the record of a step that changed nothing."""
        self.say(
            f"step {record['step']}/{self._steps}  skipped: {record['reason']} ({record['skipped_in_a_row']} in a row, "
            f"{record['skipped']} in all)"
        )

    def eval(self, record: dict[str, Any]) -> None:
        """Show an evaluation record of the metrics."""
        self.say(f"step {record['step']}/{self._steps}  held-out loss {record['loss']:.4f}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
