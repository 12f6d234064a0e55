"""Tasks of lm-evaluation-harness: found by name or file, and checked question by question before a model is read."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import metric_registry
from lm_eval.config.task import TaskConfig
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from moka_core import ConfigError, DataError, MokaError
from moka_core.config import check_keys
from moka_core.errors import first_lines
from moka_core.harness import MAX_NEW, HarnessTokenizer

SEED = 1234  # of the few-shot examples, as lm-eval's own command has it
SHOWN = 8
_TASK_KEYS = [field.name for field in dataclasses.fields(TaskConfig)]
_SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


class Reader(HarnessTokenizer, TemplateLM):
    """What a request is in tokens, without a model: `loglikelihood` gives (context, continuation) of each."""

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [self.tok_encode(request.args[0]) for request in requests]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [self.prompt_tokens(request.args[0]) for request in requests]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a model takes.

    Args:
        context: tokens of a text, at most.
        vocabulary: tokens are below it.
        check_generation: raises a ConfigError for `generation_kwargs` that the backend does not support.
    """

    context: int
    vocabulary: int
    check_generation: Callable[[Any], object] | None = None


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


def reseed(loaded: dict[str, Any]) -> None:
    """Let the few-shot examples be drawn from the beginning again, so that they are those that were checked."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)


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
        check_keys(values, [*_TASK_KEYS, "include", "task_list"], where=f"--tasks: {name}")
    if "process_results" not in values:  # which may make metrics of its own
        _check_metrics(values.get("metric_list"), where=f"--tasks: {name}")
    return file


def _check_metrics(entries: Any, *, where: str) -> None:
    """Refuse a metric that lm-eval does not have: it leaves it out without an error."""
    for entry in entries if isinstance(entries, list) else []:
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
            _raise(task.config.task, _field_problems(task) or document_problems(task, limit)[0])
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


def check_tasks(
    loaded: dict[str, Any], reader: Reader, limits: Limits, *, limit: int | None = None, chat: bool = False
) -> list[str]:
    """What is odd about the questions; an error if one of them could not be asked as it is.

    Raises:
        DataError: a question has no right answer, an empty choice, or does not fit the model; see `document_problems`
            and `_request_problem`. All of a task's are told.
        ConfigError: a task's generation settings are not supported.
    """
    notes: list[str] = []
    for name, task in loaded["tasks"].items():
        _raise(name, _field_problems(task))
        problems, odd = document_problems(task, limit)
        _raise(name, problems)
        if odd:
            notes.append(f"{name}: {_listed(odd, '; ')}")
        if _asks_itself(task):
            notes.append(
                f"{name}: its examples are drawn from the questions that are asked: one may stand before itself "
                "with its answer; name a fewshot_split in the task"
            )
        try:
            task.build_all_requests(
                limit=limit,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
                chat_template=reader.apply_chat_template if chat else None,
            )
        except MokaError:
            raise
        except Exception as error:  # see _load
            raise DataError(
                f"{name}: lm-eval cannot write its questions: {type(error).__name__}: {error}{_examples(task)}"
            ) from error
        found: dict[int, str] = {}  # one a document
        for document, problem in _request_problems(name, task, reader, limits):
            found.setdefault(document, f"document {document}: {problem}")
        _raise(name, list(found.values()), shots=bool(task.get_config("num_fewshot")))
    reseed(loaded)
    return notes


def _examples(task: Any) -> str:
    """How many examples a task asks for, and how many there are."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return ""
    there = task.fewshot_docs() if hasattr(task, "fewshot_docs") else None
    return f"; it asks for {wanted} examples" + ("" if there is None else f", and there are {len(list(there))}")


def _field_problems(task: Any) -> list[str]:
    """Which fields of a task name no column of its data: lm-eval takes such a name as the text of every question."""
    problems = []
    columns = next(iter(task.task_docs), {}) if hasattr(task, "task_docs") else {}
    for key in ("doc_to_text", "doc_to_choice"):
        value = getattr(task.config, key, None)
        if isinstance(value, str) and value.isidentifier() and columns and value not in columns:
            problems.append(
                f"{key}: expected a column of the data ({', '.join(columns)}), or a template with {{{{column}}}}; "
                f"got {value!r}"
            )
    return problems


def _asks_itself(task: Any) -> bool:
    """Whether a question can be among its own examples: lm-eval leaves it out of a named fewshot_split only."""
    if not hasattr(task, "fewshot_cfg") or not task.get_config("num_fewshot") or task.has_training_docs():
        return False
    named = task.fewshot_cfg.split is not None or task.fewshot_cfg.samples is not None
    return not named and (not task.has_validation_docs() or not task.has_test_docs())


def document_problems(task: Any, limit: int | None) -> tuple[list[str], list[str]]:
    """(why questions cannot be asked, what is odd about others), by the documents' numbers, as in `--samples`.

    lm-eval counts a question without a right answer as answered wrongly, and takes an empty choice as it is.
    """
    problems: list[str] = []
    odd: list[str] = []
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood", "generate_until"):
        return problems, odd
    if not hasattr(task, "doc_to_choice"):
        return problems, odd  # a class of its own in Python
    texts = set()
    number = -1
    for number, document in task.doc_iterator(limit=limit):
        try:
            choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
            target = task.doc_to_target(document)
            text = task.doc_to_text(document)
        except Exception as error:  # noqa: BLE001  (see _load: whatever fails is told)
            problems.append(f"document {number}: {type(error).__name__}: {error}")
            continue
        texts.add(str(text))
        if choices is not None:
            found = _choice_problem(choices)
            if found:
                problems.append(f"document {number}: {found}")
                continue
            equal = sorted({choice for choice in choices if choices.count(choice) > 1})
            if equal:
                odd.append(f"document {number}: the choice {equal[0]!r} stands twice")
        if task.config.process_results is None:
            right = text if task.OUTPUT_TYPE == "multiple_choice" and isinstance(text, int) else target
            found = _target_problem(right, choices, chosen=task.OUTPUT_TYPE == "multiple_choice")
            if found:
                problems.append(f"document {number}: {found}")
            elif choices is not None and _misread(task.config.doc_to_target, document, right, choices):
                odd.append(
                    f"document {number}: lm-eval takes the right answer {right} as a choice's number, that of "
                    f"{choices[right]!r}, though another choice has this text; if the text is meant, write "
                    f"doc_to_target: {task.config.doc_to_target.strip('{} ')}, without braces"
                )
    if number > 0 and len(texts) == 1 and texts != {""}:
        odd.append(f"every question has the same text, {next(iter(texts))!r:.60}")
    return problems, odd


def _misread(field: Any, document: dict[str, Any], right: Any, choices: list[str]) -> bool:
    """Whether lm-eval made a number of a text: it does so of digits that a template gives, not of a column's."""
    if not isinstance(field, str) or not isinstance(right, int):
        return False
    column = re.fullmatch(r"\{\{\s*(\w+)\s*\}\}", field)
    text = document.get(column[1]) if column else None
    return isinstance(text, str) and text in choices and choices[right] != text


def _choice_problem(choices: Any) -> str | None:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        return f"expected a list of choices, each a text; got {choices!r:.80}"
    empty = [number for number, choice in enumerate(choices) if not choice.strip()]
    return f"expected choices that are not empty; number {empty[0]} of {choices!r:.80} is" if empty else None


def _target_problem(target: Any, choices: list[str] | None, *, chosen: bool) -> str | None:
    if target is None or target == []:
        return "expected a right answer; it has none"
    if choices is None or not (chosen or isinstance(target, int)):
        return None
    for right in target if isinstance(target, list) else [target]:
        if isinstance(right, int) and 0 <= right < len(choices):
            continue
        if isinstance(right, str) and right in choices:
            continue
        return (
            f"expected a right answer, its number from 0 to {len(choices) - 1} or one of the choices; got {right!r:.80}"
        )
    return None


def _request_problems(name: str, task: Any, reader: Reader, limits: Limits) -> Iterator[tuple[int, str]]:
    """(a document, why what it asks of the model does not fit it)."""
    for instance in task.instances:
        where, kind, args = instance.doc_id, instance.request_type, instance.args
        if kind == "generate_until":
            settings = dict(normalize_gen_kwargs(dict(args[1]), MAX_NEW))
            if settings["do_sample"] and not settings.get("temperature"):
                raise ConfigError(f"{name}: generation_kwargs: do_sample: true needs a temperature above 0")
            if limits.check_generation is not None:
                try:
                    limits.check_generation(args[1])
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from error
            (tokens,) = reader.generate_until([instance])
            new = settings["max_gen_toks"]
            if len(tokens) + new > limits.context:
                yield (
                    where,
                    f"{len(tokens)} tokens and {new} new ones (max_gen_toks) exceed the model's context of "
                    f"{limits.context}",
                )
        elif kind == "loglikelihood_rolling":
            (tokens,) = reader.loglikelihood_rolling([instance])
            if not tokens:
                yield where, f"expected a text; got {args[0]!r}"
        else:
            if not args[1]:
                yield where, "expected an answer to score; got an empty one"
                continue
            ((context, answer),) = reader.loglikelihood([instance], disable_tqdm=True)
            tokens = context + answer
            if not answer or not context:
                yield where, f"expected an answer that adds tokens to its question; {args[1]!r:.60} does not"
            if len(tokens) > limits.context:
                yield (
                    where,
                    f"{len(context)} tokens of the question and {len(answer)} of answer {instance.idx} exceed the "
                    f"model's context of {limits.context}",
                )
        foreign = sorted({token for token in tokens if token >= limits.vocabulary})
        if foreign:
            yield where, f"token {foreign[0]} is none of the model's {limits.vocabulary}; is it its tokenizer?"


def _raise(name: str, problems: list[str], *, shots: bool = False) -> None:
    if problems:
        few = "fewer --shots make questions shorter; " if shots and "exceed" in problems[0] else ""
        raise DataError(
            f"{name}: {len(problems)} of its questions cannot be asked as they are ({few}nothing was computed):\n  "
            + _listed(problems, "\n  ")
        )


def _listed(lines: list[str], between: str) -> str:
    return between.join(first_lines(lines, SHOWN))
