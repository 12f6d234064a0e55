"""The queue of runs: the learning rate of each method by validation, then seeds on the test; a row a run.

    python -m benchmarks.accuracy.study --base report/base --data ../shared/data --minutes 120

Every method has as many tries: its four learning rates, with seed 0, scored on the validation split. The one of the
least loss of the right answers there is trained again with the seeds 1, 2, … and scored on the test split, which
nothing was chosen by. What has a row in `--rows` is not run again, so the study goes on where it was stopped;
no run is begun after `--minutes`. `python -m benchmarks.accuracy.tables` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.tasks import TASKS, load_task
from benchmarks.accuracy.training import Base, Run, execute, figures
from benchmarks.harness import RESULTS, environment, note

ROWS = RESULTS / "accuracy_smollm2-135m.jsonl"
BASE = "base"  # the method of the rows of the model without an adapter


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON lines to go on with")
    parser.add_argument("--tasks", type=_names, default=["social_iqa", "wikihow"], help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", type=_names, default=list(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="of the test")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.tasks if name not in TASKS]
    unknown += [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; tasks: {', '.join(TASKS)}; methods: {', '.join(METHODS)}")
    tasks = {name: load_task(name, arguments.data) for name in arguments.tasks}
    began, base = time.monotonic(), Base(arguments.base, "cuda" if arguments.device == "gpu" else "cpu")
    machine = _machine(arguments)
    for task in tasks.values():
        rows = read_rows(arguments.rows)
        for split in ("validation", "test"):
            if not any(row["method"] == BASE and (row["task"], row["split"]) == (task.name, split) for row in rows):
                scores = figures(base.score(task.split(split)))
                _append(arguments.rows, {"task": task.name, "method": BASE, "split": split, **scores}, machine)
    while True:
        run = next(missing(read_rows(arguments.rows), arguments), None)
        if run is None:
            note("every run has its row")
            return
        if time.monotonic() - began > 60 * arguments.minutes:
            note(f"stopped before {run}; the same command goes on")
            return
        row = execute(run, base, tasks[run.task])
        _append(arguments.rows, row, machine)


def missing(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs that have no row yet, in order; a test's only once its learning rate is known."""
    names = [field.name for field in fields(Run)]
    done = {tuple(row[name] for name in names) for row in rows if row["method"] != BASE}
    for method, task in itertools.product(arguments.methods, arguments.tasks):
        run = partial(Run, task=task, method=method, epochs=arguments.epochs)
        runs = [run(rate=rate, seed=0, split="validation") for rate in METHODS[method].rates]
        found = chosen_rate(rows, task, method, arguments.epochs)
        if found is not None:
            runs += [run(rate=found, seed=seed, split="test") for seed in range(1, arguments.seeds + 1)]
        yield from (one for one in runs if tuple(asdict(one).values()) not in done)


def chosen_rate(rows: Sequence[dict[str, Any]], task: str, method: str, epochs: int) -> float | None:
    """The learning rate of the least validation loss; None until every one was tried."""
    tried = {
        row["rate"]: row["loss"]
        for row in rows
        if (row["task"], row["method"], row["split"]) == (task, method, "validation")
        and row.get("seed") == 0
        and row["epochs"] == epochs
    }
    if not set(METHODS[method].rates) <= set(tried):
        return None
    return min(METHODS[method].rates, key=lambda rate: tried[rate])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far; none if there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _append(path: Path, row: dict[str, Any], machine: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **machine}) + "\n")
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    note(" ".join(f"{key}={value}" for key, value in shown.items() if not key.endswith("_each")))


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the machine and the versions goes into every row."""
    found = environment(argparse.Namespace(device=arguments.device, dtype="float32"))
    versions = {name: found["versions"].get(name) for name in ("moka", "torch", "transformers", "peft")}
    return {"hardware": found["gpu"] or found["cpu"], "commit": found["commit"], "versions": versions}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
