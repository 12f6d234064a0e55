"""`moka eval`: a base model, with or without an adapter, on tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from moka_cli.bases import open_held
from moka_cli.figures import TOLD_EVERY, check_json, finite, text_console, write_json
from moka_core import ConfigError, ModelError

if TYPE_CHECKING:
    from moka_core import Adapter

COMMONSENSE = (
    "boolq",
    "piqa",
    "social_iqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
SETS: dict[str, tuple[tuple[str, ...], int | None]] = {"commonsense": (COMMONSENSE, None), "mmlu": (("mmlu",), 5)}
BOOTSTRAPS = 1000


def run_eval(
    adapter: Path | None,
    base: Path,
    *,
    tasks: str | None,
    set_: str | None,
    backend: str,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    quantise: str | None,
    allow_other_base: bool,
    chat: bool,
    json_file: Path | None,
    samples: Path | None,
) -> None:
    """Check every question, compute, and print the table.

    Args:
        tasks: names and YAML files, with commas between.
        set_: one of `SETS`.
        samples: where a JSON object for each question goes, a line each.
    """
    from conversion import load_adapter
    from conversion.new_folder import check_file
    from moka_core import check_base

    names, shots = chosen(tasks, set_, shots)
    for option, number, least in (("shots", shots, 0), ("limit", limit, 1), ("batch-size", batch_size, 1)):
        if number is not None and number < least:
            raise ConfigError(f"--{option}: expected at least {least}; got {number}")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            'moka eval needs lm-evaluation-harness, which is not installed; run: pip install "moka[eval]"'
        )
    check_json(json_file)
    if samples is not None:
        check_file(samples)
        if json_file is not None and samples.resolve() == json_file.resolve():
            raise ConfigError(f"--samples: expected another file than --json's; got {samples} for both")
    console, progress = text_console(json_file), Console(stderr=True)
    value = None if adapter is None else load_adapter(adapter)
    opened = open_held(base, quantise, value)
    if value is not None:
        check_base(value.base_fingerprint, opened.fingerprint, allow_other_base=allow_other_base)
    began = time.perf_counter()
    with progress.status("reading the tasks") as status, quiet():
        loaded, notes, tokenizer = ask(names, base, backend=backend, shots=shots, limit=limit, chat=chat)
        trained = None if value is None else value.base_quantisation
        if trained not in (None, opened.quantisation):
            notes.append(f"the adapter was trained on a base held as {trained}; here it is {opened.quantisation}")
        for note in notes:
            progress.print(f"[yellow]note[/yellow]: {escape(note)}", highlight=False, soft_wrap=True)
        tell = status.update if progress.is_terminal else partial(progress.print, highlight=False, markup=False)
        tell("loading the model")
        options = {"quantise": opened.quantisation, "allow_other_base": allow_other_base, "batch_size": batch_size}
        if backend == "torch":
            from moka_torch.evaluation import load_lm

            lm: Any = load_lm(base, adapter, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
        else:
            lm = flax_lm(base, value, tokenizer, **options)  # type: ignore[arg-type]
        every = 0.0 if progress.is_terminal else TOLD_EVERY
        results = evaluate(lm, loaded, limit=limit, chat=chat, tell=tell, every=every)
    report = figures(results)
    console.print(results_table(report))
    if samples is not None:
        write_samples(samples, results["samples"])
        console.print(f"every question: {samples}", highlight=False, markup=False)
    settings = {
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "backend": backend,
        "quantise": opened.quantisation,
        "shots": shots,
        "limit": limit,
        "batch_size": batch_size,
        "chat": chat,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(json_file, {**settings, **report, "notes": notes})
    again = f"--tasks {tasks}" if set_ is None else f"--set {set_}"
    asked = "".join(f" --{name} {entry}" for name, entry in (("shots", shots), ("limit", limit)) if entry is not None)
    asked += " --chat" * chat + " --backend jax" * (backend == "jax")
    what, where = ("the base alone", "") if adapter is not None else ("with an adapter", "ADAPTER ")
    console.print(
        f"next: {what}: moka eval {where}--base {base} {again}{asked} --quantise {opened.quantisation}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def chosen(tasks: str | None, set_: str | None, shots: int | None) -> tuple[list[str], int | None]:
    """The names of the tasks, and how many examples stand before each question."""
    if (tasks is None) == (set_ is None):
        came = "neither" if tasks is None else "both"
        raise ConfigError(f"expected either --tasks NAME,FILE.yaml or --set {'|'.join(SETS)}; got {came}")
    if set_ is not None:
        if set_ not in SETS:
            raise ConfigError(f"--set: expected {' or '.join(SETS)}; got {set_!r}")
        named, own = SETS[set_]
        return list(named), own if shots is None else shots
    names = [name.strip() for name in (tasks or "").split(",")]
    if not all(names):
        raise ConfigError(f"--tasks: expected names or YAML files with commas between; got {tasks!r}")
    for name in names:
        if name in SETS:
            raise ConfigError(f"--tasks: {name} is a set of tasks; use --set {name}")
    return names, shots


def ask(
    names: list[str], base: Path, *, backend: str, shots: int | None, limit: int | None, chat: bool
) -> tuple[dict[str, Any], list[str], Any]:
    """The tasks, checked; what is to be said of them; and the tokenizer. No weight is read."""
    from transformers import AutoConfig

    from moka_cli.eval_checks import Limits, check_tasks
    from moka_cli.eval_tasks import Reader, load_tasks
    from moka_cli.train import load_tokenizer

    tokenizer = load_tokenizer(base)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{base}: expected a tokenizer with an end token (eos_token); it has none")
    if chat and tokenizer.chat_template is None:
        raise ConfigError(f"--chat: expected a tokenizer with a chat template; that of {base} has none")
    check_generation: Callable[[Any], object] | None = None
    if backend == "jax":
        from moka_jax.evaluation import generation

        check_generation = generation
    config = AutoConfig.from_pretrained(base)
    limits = Limits(
        context=config.max_position_embeddings, vocabulary=config.vocab_size, check_generation=check_generation
    )
    loaded = load_tasks(names, shots=shots, limit=limit)
    notes = check_tasks(loaded, Reader(tokenizer), limits, limit=limit, chat=chat)
    fixed = [name for name, task in loaded["tasks"].items() if shots and task.get_config("num_fewshot") != shots]
    if fixed:
        notes.append(f"--shots {shots} is not for {', '.join(fixed)}: num_fewshot is fixed there")
    return loaded, notes, tokenizer


def flax_lm(
    base: Path, adapter: Adapter | None, tokenizer: Any, *, quantise: str, allow_other_base: bool, batch_size: int
) -> Any:
    """The base in JAX in float32, and the adapter on it, for lm-eval."""
    from moka_cli.generate import stop_tokens
    from moka_cli.train import load_model
    from moka_jax import import_adapter
    from moka_jax.evaluation import FlaxLM

    model = load_model(base, quantise=quantise)
    if adapter is not None:
        import_adapter(model, adapter, allow_other_base=allow_other_base)
    return FlaxLM(model, tokenizer, batch_size=batch_size, stop_tokens=stop_tokens(tokenizer, base))


class Counter:
    """In the place of lm-eval's cache, which is told of every answer: tells how many there are.

    Args:
        total: of answers.
        every: seconds between what is told, at least.
    """

    def __init__(self, total: int, tell: Callable[[str], object], every: float) -> None:
        self._total, self._tell, self._every, self._count = total, tell, every, 0
        self._began = self._told = time.monotonic()

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._count += 1
        now = time.monotonic()
        if now - self._told >= self._every:
            self._told = now
            left = round((now - self._began) / self._count * (self._total - self._count))
            self._tell(f"{self._count} of {self._total} answers, {datetime.timedelta(seconds=left)} left")


def evaluate(
    lm: Any,
    loaded: dict[str, Any],
    *,
    limit: int | None,
    chat: bool,
    tell: Callable[[str], object],
    every: float = 0.0,
) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` gives, with the seeds that lm-eval's own command sets.

    Args:
        loaded: tasks that `check_tasks` has seen.
        tell: is called with how far it is.
        every: seconds between that, at least.

    Raises:
        ModelError: a log-likelihood is not finite.
    """
    from lm_eval import evaluator

    from moka_cli.eval_checks import SEED

    random.seed(0)
    np.random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
    lm.set_cache_hook(Counter(sum(len(task.instances) for task in loaded["tasks"].values()), tell, every))
    if os.environ.get("TQDM_DISABLE") == "1":
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, partial(getattr(lm, name), disable_tqdm=True))
    results: Any = evaluator.evaluate(
        lm=lm,
        task_dict=loaded,  # type: ignore[arg-type]
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
    )
    for task, samples in results["samples"].items():
        for sample in samples:
            values = [entry for answers in sample["resps"] for entry in answers]
            numbers = [value[0] if isinstance(value, tuple) else value for value in values]
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise ModelError(
                    f"{task}: document {sample['doc_id']}: a log-likelihood is not finite; the model's weights or its "
                    "adapter may hold NaN or infinite entries"
                )
    return results


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what lm-eval and datasets print off standard output, and let lm-eval start no processes of its own."""
    import datasets

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # forked from a process that has threads, they could hang
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if os.environ.get("TQDM_DISABLE") == "1":
        datasets.disable_progress_bars()
    with contextlib.redirect_stdout(sys.stderr):
        yield


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """{"tasks": {name: {questions, shots, metrics: {metric: {value, stderr}}}}, "groups": the same} of lm-eval's."""
    import lm_eval

    found: dict[str, Any] = {"lm_eval": lm_eval.__version__, "tasks": {}, "groups": {}}
    for name, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filtered}")
                title = metric if filtered == "none" else f"{metric} ({filtered})"
                metrics[title] = {"value": _number(value), "stderr": _number(error)}
        kind = "tasks" if name in results["samples"] else "groups"
        found[kind][name] = {
            "questions": values.get("sample_len", values.get("sample_count")),
            "shots": results["n-shot"].get(name),
            "metrics": metrics,
        }
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, np.number)) else None


def results_table(report: dict[str, Any]) -> Table:
    """A row for each metric of each task, then of each group."""
    numbers = ("value", "± s.e.", "questions", "shots")
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    table = Table(Column("task", overflow="fold"), Column("metric", overflow="fold"), *columns)
    for kind in ("tasks", "groups"):
        for name, entry in report[kind].items():
            first = [name, str(entry["questions"] or "–"), "–" if entry["shots"] is None else str(entry["shots"])]
            for metric, figure in entry["metrics"].items():
                value, error = (
                    "–" if number is None else f"{number:.4f}" for number in (figure["value"], figure["stderr"])
                )
                table.add_row(first[0], metric, value, error, *first[1:])
                first = ["", "", ""]
        table.add_section()
    return table


def write_samples(file: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """A line of JSON for each question: the task's name, and what lm-eval logs of it, whole or not at all."""
    from conversion.new_folder import new_file

    with new_file(file) as draft, draft.open("w", encoding="utf-8") as out:
        for task, logged in samples.items():
            for sample in logged:
                print(json.dumps({"task": task, **finite(sample)}, ensure_ascii=False, default=str), file=out)
