"""Tasks of lm-evaluation-harness, found by name or file; `moka_cli.eval_checks` looks at their questions."""

from __future__ import annotations

import dataclasses
import difflib
import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager

from moka_cli.eval_checks import document_problems, field_problems, refuse, reseed
from moka_core import ConfigError, DataError
from moka_core.config import check_keys
from moka_core.harness import HarnessTokenizer

_TASK_KEYS = [field.name for field in dataclasses.fields(TaskConfig)]
_METRIC_KEYS = ("metric", "aggregation", "higher_is_better", "hf_evaluate")
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Reader(HarnessTokenizer, TemplateLM):
    """What a request is in tokens, without a model: `loglikelihood` gives (context, continuation) of each."""

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [self.tok_encode(request.args[0]) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [self.prompt_tokens(request.args[0]) for request in requests]


def load_tasks(names: Sequence[str], *, shots: int | None = None, limit: int | None = None) -> dict[str, Any]:
    """What `TaskManager.load` gives, of names of lm-eval's tasks and groups, and of YAML files of its format.

    Args:
        shots: examples before each question, in place of the task's own number unless that is 0.
        limit: questions of each task that are looked at.

    Raises:
        ConfigError: a name is unknown, a file is not there or no task, or two tasks have one name.
        DataError: a task's data cannot be read, or its first question cannot be asked.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--tasks: expected each task once; {', '.join(twice)} stands there twice")
    files = [_file(name) for name in names]
    manager = TaskManager(include_defaults=None in files)  # lm-eval's own are 14,000
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    owners: dict[str, str] = {}
    for name, file in zip(names, files, strict=True):
        if file is None and name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm_eval ls tasks lists all."
            raise ConfigError(f"--tasks: lm-eval has no task {name!r}; {hint} A task of yours is a YAML file's path")
        loaded = _load(manager, name if file is None else str(file), limit)
        for task in loaded["tasks"]:
            if task in owners:
                raise ConfigError(f"--tasks: {owners[task]} and {name} are both, or both hold, a task {task!r}")
            owners[task] = name
        for part in found:
            found[part].update(loaded.get(part) or {})
    for task in found["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if fixed != 0:
            task.set_config(key="num_fewshot", value=(fixed or 0) if shots is None else shots)
    reseed(found)
    return found


def _file(name: str) -> Path | None:
    """The YAML file that a name is the path of; None for a name."""
    file = Path(name)
    if file.suffix in (".json", ".jsonl", ".csv"):
        raise ConfigError(
            f"--tasks: {name} holds data; expected a task of lm-eval in YAML that names it (dataset_kwargs: data_files)"
        )
    if file.suffix not in (".yaml", ".yml") and os.sep not in name:
        return None
    if not os.path.isfile(file):
        raise ConfigError(f"--tasks: {name}: no such file; expected a task of lm-eval in YAML")
    values = _mapping(file)
    task = values.get("task")
    if not isinstance(task, str):
        raise ConfigError(
            f"--tasks: {name}: expected a task of lm-eval, a YAML mapping whose 'task' is its name; got {task!r:.80}; "
            "of a group, give the files of its tasks"
        )
    if "class" not in values:  # one in Python reads keys of its own
        if "task_list" in values:
            raise ConfigError(f"--tasks: {name}: task_list: lm-eval reads none of a file; give the files of its tasks")
        check_keys(values, [*_TASK_KEYS, "include"], where=f"--tasks: {name}")
    if "process_results" not in values:  # which may make metrics of its own
        _check_metrics(values.get("metric_list"), where=f"--tasks: {name}")
    return file


def _check_metrics(entries: Any, *, where: str) -> None:
    """Refuse a metric that lm-eval does not have, and a misspelt key: it passes over both."""
    for entry in entries if isinstance(entries, list) else []:
        for key in set(entry) - set(_METRIC_KEYS) if isinstance(entry, dict) else ():
            near = difflib.get_close_matches(str(key), _METRIC_KEYS, n=1, cutoff=0.8)
            if near:
                raise ConfigError(f"{where}: metric_list: {key!r} would go to the metric; did you mean {near[0]!r}?")
        metric = entry.get("metric") if isinstance(entry, dict) and not entry.get("hf_evaluate") else None
        if isinstance(metric, str) and metric not in metric_registry:
            near = difflib.get_close_matches(metric, metric_registry.keys(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(metric_registry.keys()))}"
            raise ConfigError(f"{where}: metric_list: lm-eval has no metric {metric!r}; {hint}")


def _mapping(file: Path) -> dict[Any, Any]:
    class Loader(yaml.SafeLoader):
        """Takes lm-eval's !function without importing it."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        with file.open("rb") as opened:
            value = yaml.load(opened, Loader=Loader)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"--tasks: {file}: expected a task of lm-eval in YAML; {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"--tasks: {file}: expected a task of lm-eval, a YAML mapping with a key 'task'; got {type(value).__name__}"
        )
    return value


def _load(manager: TaskManager, name: str, limit: int | None) -> Any:
    try:
        return manager.load([name])
    except FileNotFoundError as error:
        raise DataError(f"{name}: a file of the task is missing: {error}") from error
    except Exception as error:  # a task's data, prompts and functions are somebody else's, and may fail in any way
        task = _half_built(error)
        if task is not None:
            refuse(task.config.task, field_problems(task) or document_problems(task, limit)[0])
        raise DataError(
            f"{name}: lm-eval cannot load this task: {_why(error, _half_built(error, 'dataset'))}"
        ) from error


def _half_built(error: Exception, having: str = "task_docs") -> Any:
    """The task that failed over its first document, if it was that: lm-eval looks at it as it loads, and says not why.

    It is found in the traceback; its data are loaded.

    Args:
        having: what the task must have by then: the documents that are asked, or only its `dataset`.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    return next((owner for owner in owners if getattr(owner, having, None) is not None), None)


def _why(error: Exception, task: Any) -> str:
    """Why a task cannot be loaded, and what to do.

    Args:
        task: if its data could be read.
    """
    if task is None:
        cause = error
        while isinstance(cause.__cause__ or cause.__context__, Exception):  # the first says what failed, not why
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        told = "" if cause is error else f" ({type(cause).__name__}: {cause})"
        return (
            f"{type(error).__name__}: {error}{told}. Its data could not be read: those of a task by name lie on the "
            "hub; a YAML file may name files of your own (dataset_kwargs: data_files, from the working directory on)"
        )
    splits = ", ".join(task.dataset)
    named = {key: getattr(task.config, key) for key in _SPLIT_KEYS if getattr(task.config, key) is not None}
    for key, split in named.items():
        if split not in task.dataset:
            return f"{key}: expected one of the data's splits, {splits}; got {split!r}"
    if not set(named) & {"validation_split", "test_split"}:
        return f"expected test_split or validation_split, whose questions are asked; the data's splits are {splits}"
    empty = [split for split in named.values() if not len(task.dataset[split])]
    if empty:
        return f"expected questions; split {empty[0]!r} has none"
    return f"{type(error).__name__}: {error}"
