"""The queue of runs: the learning rate of each method by validation, then seeds on the test; a row a run.

    python -m benchmarks.accuracy.study --base report/base --data ../shared/data --minutes 120

Every method has as many tries: its three learning rates, with seed 0, scored on the validation split. The one of the
least loss of the right answers there is trained again with the seeds 1, 2, … and scored on the test split, which
nothing was chosen by. What has a row in `--rows` is not run again, so the study goes on where it was stopped;
no run is begun after `--minutes`. On a CPU two `--workers` of one core each are faster than one of two.
`python -m benchmarks.accuracy.tables` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
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
SETTING = ("epochs", "dtype")  # the same in every row of a file
Rows = Sequence[dict[str, Any]]


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
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the base")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after these")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.tasks if name not in TASKS]
    unknown += [name for name in arguments.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; tasks: {', '.join(TASKS)}; methods: {', '.join(METHODS)}")
    for row in read_rows(arguments.rows):
        if any(row[name] != getattr(arguments, name) for name in SETTING):
            parser.error(f"{arguments.rows} has rows of {', '.join(f'{name} {row[name]}' for name in SETTING)}")
    began, machine = time.monotonic(), _machine(arguments)
    flying: dict[Future[dict[str, Any]], Run] = {}
    with _pool(arguments) as pool:
        while True:
            if time.monotonic() - began <= 60 * arguments.minutes:
                runs = (run for run in missing(read_rows(arguments.rows), arguments) if run not in flying.values())
                for run in itertools.islice(runs, arguments.workers - len(flying)):
                    flying[pool.submit(_work, run)] = run
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                del flying[future]
                _append(arguments.rows, future.result(), machine)
    left = next(missing(read_rows(arguments.rows), arguments), None)
    note("every run has its row" if left is None else f"stopped before {left}; the same command goes on")


_bench: dict[str, Any] = {}  # what a worker holds: the base and the tasks


def _pool(arguments: argparse.Namespace) -> Executor:
    """What the runs are computed in: this process, or several that share its cores."""
    if arguments.workers == 1:
        return ThreadPoolExecutor(1, initializer=_open, initargs=(arguments,))
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(arguments.workers, mp_context=spawn, initializer=_open, initargs=(arguments,))


def _open(arguments: argparse.Namespace) -> None:
    if arguments.workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.workers))
    _bench["tasks"] = {name: load_task(name, arguments.data) for name in arguments.tasks}
    _bench["base"] = Base(arguments.base, "cuda" if arguments.device == "gpu" else "cpu", arguments.dtype)


def _work(run: Run) -> dict[str, Any]:
    base, task = _bench["base"], _bench["tasks"][run.task]
    if run.method == BASE:
        return {**asdict(run), **figures(base.score(task.split(run.split)))}
    return execute(run, base, task)


def missing(rows: Rows, arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs that have no row yet, in order; a test's only once its learning rate is known."""
    names = [field.name for field in fields(Run)]
    done = {tuple(row[name] for name in names) for row in rows}
    setting = {name: getattr(arguments, name) for name in SETTING}
    runs = [
        Run(task=task, method=BASE, rate=0.0, seed=0, split=split, **setting)
        for task, split in itertools.product(arguments.tasks, ("validation", "test"))
    ]
    for method, task in itertools.product(arguments.methods, arguments.tasks):
        run = partial(Run, task=task, method=method, **setting)
        runs += [run(rate=rate, seed=0, split="validation") for rate in METHODS[method].rates]
        found = chosen_rate(rows, task, method)
        if found is not None:
            runs += [run(rate=found, seed=seed, split="test") for seed in range(1, arguments.seeds + 1)]
    yield from (one for one in runs if tuple(asdict(one).values()) not in done)


def chosen_rate(rows: Rows, task: str, method: str) -> float | None:
    """The learning rate of the least validation loss; None until every one was tried."""
    tried = {
        row["rate"]: row["loss"]
        for row in rows
        if (row["task"], row["method"], row["split"], row["seed"]) == (task, method, "validation", 0)
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
    found = environment(argparse.Namespace(device=arguments.device, dtype=arguments.dtype))
    versions = {name: found["versions"].get(name) for name in ("moka", "torch", "transformers", "peft")}
    return {"hardware": found["gpu"] or found["cpu"], "commit": found["commit"], "versions": versions}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
