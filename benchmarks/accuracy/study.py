"""The queue of runs: the learning rate of each method by validation, then seeds on the test; a row a run.

    python -m benchmarks.accuracy.study --base report/base --data ../shared/data --minutes 120

Learning rates are tried with seed 0 and scored on the validation split, by one rule for all methods
(`benchmarks.accuracy.rows.next_rates`). The one of the least loss of the right answers there is trained again with the
seeds 1, 2, … and scored on the test split, which nothing was chosen by. What has a row in `--rows` is not run again, so
the study goes on where it was stopped; no run is begun after `--minutes`. On a CPU two `--workers` of one core each are
faster than one of two. `python -m benchmarks.accuracy.tables` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.thread import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.rows import BASE, ROWS, Rows, append_row, held, next_rates, read_rows
from benchmarks.accuracy.tasks import TASKS, load_task
from benchmarks.accuracy.training import Base, Run, execute, figures
from benchmarks.harness import environment, note
from conversion import open_base
from moka_core import Architecture, MokaError


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
    if arguments.workers < 1:
        parser.error(f"--workers: expected at least 1; got {arguments.workers}")
    try:
        with held(arguments.rows):
            failed = _study(arguments)
    except MokaError as error:
        parser.error(str(error))
    if failed:
        raise SystemExit(1)


def _study(arguments: argparse.Namespace) -> list[Run]:
    """Run what is missing; the runs that failed."""
    began, machine = time.monotonic(), _machine(arguments)
    marks = _marks(arguments)
    _check_marks(read_rows(arguments.rows), marks, arguments.rows)
    flying: dict[Future[dict[str, Any]], Run] = {}
    failed: list[Run] = []
    with _pool(arguments) as pool:
        while True:
            if time.monotonic() - began <= 60 * arguments.minutes:
                taken = [*flying.values(), *failed]
                runs = (run for run in missing(read_rows(arguments.rows), arguments) if run not in taken)
                for run in itertools.islice(runs, arguments.workers - len(flying)):
                    flying[pool.submit(_work, run)] = run
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run, error = flying.pop(future), future.exception()
                if error is None:
                    row = {**future.result(), "made": marks[run.task, run.method], **machine}
                    append_row(arguments.rows, row)
                    _tell(row)
                elif isinstance(error, BrokenExecutor):
                    raise error
                else:
                    failed.append(run)
                    note(f"FAILED {run}: {type(error).__name__}: {error}")
    left = next(missing(read_rows(arguments.rows), arguments), None)
    note("every run has its row" if left is None else f"stopped before {left}; the same command goes on")
    return failed


def _marks(arguments: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """What decides the rows of a task and a method beside what `Run` says: of each row, as `made`."""
    base = open_base(arguments.base, quantise="none")
    architecture = Architecture.from_hf_config(base.config)
    common = {name: getattr(arguments, name) for name in ("dtype", "device", "epochs")} | {
        "base": _digest(base.fingerprint)
    }
    found = {}
    for task in arguments.tasks:
        data = _digest(asdict(load_task(task, arguments.data)))
        for method in [BASE, *arguments.methods]:
            found[task, method] = {**common, "data": data, "method": method_digest(method, architecture)}
    return found


def method_digest(method: str, architecture: Architecture) -> str:
    """What a row's `made` says of its method: another one for another config."""
    if method == BASE:
        return _digest(None)
    return _digest({**METHODS[method].config(architecture).to_dict(), "gates": METHODS[method].gate_rate})


def _digest(value: Any) -> str:
    text = json.dumps(
        value, sort_keys=True, default=lambda other: sorted(other) if isinstance(other, set) else str(other)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_marks(rows: Rows, marks: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    """Refuse to add to rows that were made of something else.

    Raises:
        MokaError: some were.
    """
    for row in rows:
        made = {"epochs": row["epochs"], **row["made"]}
        mark = marks.get((row["task"], row["method"]), made)
        other = [name for name, value in mark.items() if made.get(name) != value]
        if other:
            raise MokaError(
                f"{path}: expected rows of the same {' and '.join(other)}; that of {row['method']} on {row['task']} is "
                "of another; give another --rows, or remove such rows to run them again"
            )


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
        questions = task.split(run.split)
        sources = sorted({question.source for question in questions})
        row = {**asdict(run), "sources": [sources.index(question.source) for question in questions]}
        return {**row, **figures(base.score(questions))}
    return execute(run, base, task)


def missing(rows: Rows, arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs that have no row yet, in order; a test's only once its learning rate is known."""
    names = [field.name for field in fields(Run)]
    done = {tuple(row[name] for name in names) for row in rows}
    make = partial(Run, epochs=arguments.epochs, dtype=arguments.dtype)
    runs = [
        make(task=task, method=BASE, rate=0.0, seed=0, split=split)
        for task, split in itertools.product(arguments.tasks, ("validation", "test"))
    ]
    for method, task in itertools.product(arguments.methods, arguments.tasks):
        rates, found = next_rates(rows, task, method)
        runs += [make(task=task, method=method, rate=rate, seed=0, split="validation") for rate in rates]
        if found is not None and METHODS[method].tested:
            seeds = range(1, arguments.seeds + 1)
            runs += [make(task=task, method=method, rate=found, seed=seed, split="test") for seed in seeds]
    yield from (one for one in runs if tuple(asdict(one).values()) not in done)


def _tell(row: dict[str, Any]) -> None:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    hidden = ("sources", "made", "hardware", "commit", "versions")
    note(" ".join(f"{key}={value}" for key, value in shown.items() if not key.endswith("_each") and key not in hidden))


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the machine and the versions goes into every row."""
    found = environment(argparse.Namespace(device=arguments.device, dtype=arguments.dtype))
    versions = {name: found["versions"].get(name) for name in ("moka", "torch", "transformers", "peft")}
    return {"hardware": found["gpu"] or found["cpu"], "commit": found["commit"], "versions": versions}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
