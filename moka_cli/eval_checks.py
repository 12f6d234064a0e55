"""What is wrong or odd with the questions of lm-evaluation-harness' tasks, before a model is read."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import get_aggregation, get_metric_aggregation, metric_registry
from lm_eval.models.utils import normalize_gen_kwargs

from moka_core import ConfigError, DataError, MokaError
from moka_core.errors import first_lines
from moka_core.harness import MAX_NEW

if TYPE_CHECKING:
    from moka_cli.eval_tasks import Reader

SEED = 1234  # of the few-shot examples, as lm-eval's own command has it
SHOWN = 8
_COLUMN = re.compile(r"\{\{\s*(\w+)\s*\}\}")  # a template's plain column


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


def reseed(loaded: dict[str, Any]) -> None:
    """Let the few-shot examples be drawn from the beginning again, so that they are those that were checked."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)


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
        refuse(name, field_problems(task))
        problems, odd = document_problems(task, limit)
        refuse(name, problems)
        if odd:
            notes.append(f"{name}: {_listed(odd, '; ')}")
        try:
            with _examples_drawn(task) as drawn:
                task.build_all_requests(
                    limit=limit,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=True,
                    chat_template=reader.apply_chat_template if chat else None,
                )
        except MokaError:
            raise
        except Exception as error:  # see `moka_cli.eval_tasks`
            raise DataError(
                f"{name}: lm-eval cannot write its questions: {type(error).__name__}: {error}{_examples(task)}"
            ) from error
        found: dict[int, str] = {}  # one a document
        for document, problem in _request_problems(name, task, reader, limits):
            found.setdefault(document, f"document {document}: {problem}")
        refuse(name, list(found.values()), shots=bool(task.get_config("num_fewshot")))
        examples = {id(example): _as_example(task, example) for _, some in drawn for example in some}
        refuse(name, _example_problems(task, examples.values()))
        before = _stand_before_themselves(task, drawn, examples)
        if before:
            notes.append(
                f"{name}: {before} of its questions stand among their own examples, with their answers; name a "
                "fewshot_split that has other ones"
            )
        _rehearse(name, task, limit)
        notes += [f"{name}: {told}" for told in _aggregations(task)]
    reseed(loaded)
    return notes


def _examples(task: Any) -> str:
    """How many examples a task asks for, and how many there are."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return ""
    there = task.fewshot_docs() if hasattr(task, "fewshot_docs") else None
    return f"; it asks for {wanted} examples" + ("" if there is None else f", and there are {len(list(there))}")


def field_problems(task: Any) -> list[str]:
    """Which fields of a task name no column of its data: lm-eval takes such a name as the text of every question."""
    problems = []
    columns: dict[str, Any] = next(iter(task.task_docs), {}) if hasattr(task, "task_docs") else {}
    keys = ["doc_to_text", "doc_to_choice"]
    if task.config.doc_to_choice is None and task.config.process_results is None:
        keys.append("doc_to_target")  # of choices it may be the right one's text
    for key in keys:
        value = getattr(task.config, key, None)
        if isinstance(value, str) and value.isidentifier() and columns and value not in columns:
            problems.append(
                f"{key}: expected a column of the data ({', '.join(columns)}), or a template with {{{{column}}}}; "
                f"got {value!r}"
            )
    return problems


@contextlib.contextmanager
def _examples_drawn(task: Any) -> Iterator[list[tuple[Any, list[Any]]]]:
    """(a document, its examples) of all that lm-eval writes meanwhile; nothing of a task of another kind."""
    drawn: list[tuple[Any, list[Any]]] = []
    sampler = getattr(task, "sampler", None)
    if sampler is None or not task.get_config("num_fewshot"):
        yield drawn
        return
    write, sample = task.fewshot_context, sampler.sample

    def writing(document: Any, *args: Any, **options: Any) -> Any:
        drawn.append((document, []))
        return write(document, *args, **options)

    def sampling(*args: Any, **options: Any) -> Any:
        found = sample(*args, **options)
        drawn[-1][1].extend(found)
        return found

    task.fewshot_context, sampler.sample = writing, sampling
    try:
        yield drawn
    finally:
        del task.fewshot_context, sampler.sample


def _as_example(task: Any, document: Any) -> tuple[Any, Any, Any]:
    """(text, choices or None, answer) of a document as an example of a task in YAML, which alone has such."""
    own = task.fewshot_cfg
    choices = task.doc_to_choice(document, own.doc_to_choice) if own.doc_to_choice else None
    return task.doc_to_text(document, own.doc_to_text), choices, task.doc_to_target(document, own.doc_to_target)


def _example_problems(task: Any, examples: Iterable[tuple[Any, Any, Any]]) -> list[str]:
    """What is wrong with examples: lm-eval takes -1 as the last choice, and writes no answer where there is none."""
    problems = []
    for number, (text, choices, target) in enumerate(examples):
        problem = _choice_problem(choices) if choices is not None else None
        if problem is None and task.config.process_results is None:
            chosen = task.OUTPUT_TYPE == "multiple_choice" and not isinstance(text, int)
            problem = _target_problem(text if isinstance(text, int) else target, choices, chosen=chosen)
        if problem:
            problems.append(f"example {number}, {str(text)!r:.40}: {problem}")
    return problems


def _stand_before_themselves(
    task: Any, drawn: list[tuple[Any, list[Any]]], examples: Mapping[int, tuple[Any, Any, Any]]
) -> int:
    """Of how many questions an example has the same text and answer."""
    count = 0
    for document, some in drawn:
        own = repr((task.doc_to_text(document), task.doc_to_target(document)))
        texts = [examples[id(example)] for example in some]
        count += own in [repr((text, target)) for text, _, target in texts]
    return count


def _rehearse(name: str, task: Any, limit: int | None) -> None:
    """Score made-up answers, so that what cannot be scored is known before the model's are computed.

    A task's own `process_results` sees one document.

    Raises:
        DataError: lm-eval cannot score the answers.
        ConfigError: a metric of the task is none of its kind of answers, so that lm-eval would leave it out.
    """
    if not hasattr(task, "doc_to_choice"):
        return
    asked: dict[int, list[Any]] = defaultdict(list)
    for instance in task.instances:
        instance.resps = [_made_up(instance)] * max(1, instance.repeats or 1)
        asked[instance.doc_id].append(instance)
    values: dict[str, list[Any]] = defaultdict(list)
    number, documents = -1, dict(task.doc_iterator(limit=limit))
    try:
        task.apply_filters()
        for number, requests in asked.items():
            requests.sort(key=lambda request: request.idx)
            for key in requests[0].filtered_resps:
                answers = [request.filtered_resps[key] for request in requests]
                for metric, value in task.process_results(documents[number], answers).items():
                    values[metric].append(value)
            if callable(task.config.process_results):
                return
        for metric, found in values.items():
            if metric in task.aggregation():
                task.aggregation()[metric](found)
    except Exception as error:  # see `moka_cli.eval_tasks`
        where = f"document {number}" if not values or len(next(iter(values.values()))) < len(asked) else "all documents"
        raise DataError(
            f"{name}: lm-eval cannot score the answers, {where}: {type(error).__name__}: {error}; does every document "
            "have a right answer of the kind that doc_to_target and metric_list expect?"
        ) from error
    finally:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
    if asked and task.config.process_results is None:
        metrics = [_metric_name(entry) for entry in task.config.metric_list or []]
        missing = [metric for metric in metrics if metric not in values]
        if missing:
            raise ConfigError(
                f"{name}: metric_list: lm-eval makes no {' and no '.join(missing)} of the answers of a task of "
                f"output_type {task.OUTPUT_TYPE}, only {', '.join(values) or 'nothing'}"
            )


def _metric_name(entry: dict[str, Any]) -> str:
    metric = entry["metric"]
    return metric.__name__ if callable(metric) else metric


def _aggregations(task: Any) -> Iterator[str]:
    """Of which metrics the table has something else than the metric's own aggregation, mostly the mean."""
    for entry in task.config.metric_list or []:
        metric, given = entry["metric"], entry.get("aggregation")
        if not (isinstance(given, str) and isinstance(metric, str) and metric in metric_registry):
            continue
        if get_aggregation(given) is not get_metric_aggregation(metric):
            yield f"{metric} is aggregated by {given}, not as usual"


def _made_up(instance: Any) -> Any:
    if instance.request_type == "generate_until":
        return "a"
    return -1.0 if instance.request_type == "loglikelihood_rolling" else (-1.0 - instance.idx, False)


def document_problems(task: Any, limit: int | None) -> tuple[list[str], list[str]]:
    """(why questions cannot be asked, what is odd about others), by the documents' numbers, as in `--samples`.

    lm-eval counts a question without a right answer as answered wrongly, and takes an empty choice as it is.
    """
    problems: list[str] = []
    odd: list[str] = []
    if not hasattr(task, "doc_to_choice"):
        return problems, odd  # a class of its own in Python
    texts = set()
    number = -1
    for number, document in task.doc_iterator(limit=limit):
        try:
            choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else None
            target = task.doc_to_target(document)
            text = task.doc_to_text(document)
        except Exception as error:  # noqa: BLE001  (whatever fails is told)
            problems.append(f"document {number}: {type(error).__name__}: {error}")
            continue
        texts.add(str(text))
        empty = _empty_column(task.config, document)
        if empty:
            problems.append(f"document {number}: expected a text in {empty}; got null")
            continue
        if choices is not None:
            found = _choice_problem(choices)
            if found:
                problems.append(f"document {number}: {found}")
                continue
            if len(choices) == 1 and task.OUTPUT_TYPE == "multiple_choice":
                odd.append(f"document {number}: it has one choice only")
            equal = sorted({choice for choice in choices if choices.count(choice) > 1})
            if equal:
                odd.append(f"document {number}: the choice {equal[0]!r} stands twice")
        if task.config.process_results is None and task.OUTPUT_TYPE != "loglikelihood_rolling":
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


def _empty_column(config: Any, document: dict[str, Any]) -> str | None:
    """A column without a value that a field names, alone or as a plain {{column}}: lm-eval would write "None"."""
    fields = [field for field in (config.doc_to_text, config.doc_to_target) if isinstance(field, str)]
    named = [column for field in fields for column in _COLUMN.findall(field)]
    if isinstance(config.doc_to_text, str):  # a target without a value is told as a missing answer
        named.insert(0, config.doc_to_text)
    return next((column for column in named if column in document and document[column] is None), None)


def _misread(field: Any, document: dict[str, Any], right: Any, choices: list[str]) -> bool:
    """Whether lm-eval made a number of a text: it does so of digits that a template gives, not of a column's."""
    if not isinstance(field, str) or not isinstance(right, int):
        return False
    column = _COLUMN.fullmatch(field)
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
    if choices is None:
        texts = target if isinstance(target, list) else [target]
        blank = any(isinstance(text, str) and not text.strip() for text in texts)
        return f"expected a right answer that is not empty; got {target!r:.80}" if blank else None
    if not (chosen or isinstance(target, int)):
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


def refuse(name: str, problems: list[str], *, shots: bool = False) -> None:
    if problems:
        few = "fewer --shots make questions shorter; " if shots and "exceed" in problems[0] else ""
        raise DataError(
            f"{name}: {len(problems)} of its questions cannot be asked as they are ({few}documents count from 0; "
            "nothing was computed):\n  " + _listed(problems, "\n  ")
        )


def _listed(lines: list[str], between: str) -> str:
    return between.join(first_lines(lines, SHOWN))
