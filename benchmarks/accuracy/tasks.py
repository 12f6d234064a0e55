"""Multiple-choice tasks in BIG-bench's format: read strictly, and split so that no source is in two splits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moka_core import DataError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Args:
        prompt: what the model is shown.
        choices: the answers, at least two, each beginning with a space: what may follow the prompt.
        right: the number of the right one.
        source: what the question is about; questions of one source are in one split.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Task:
    """Questions of one kind in three splits."""

    name: str
    train: Sequence[Question]
    validation: Sequence[Question]
    test: Sequence[Question]

    def split(self, name: str) -> Sequence[Question]:
        """The questions of a split by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a task lies, how its questions are asked, and what they are about."""

    file: str
    ask: Callable[[str], str]
    about: Callable[[str], str]


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _claim(text: str) -> str:
    instruction = "Is the claim True or False by the passage, or Neither, where the passage does not tell?"
    return f"Passage: {text}\n{instruction}\nAnswer:"


def _goal(text: str) -> str:
    goal = text.removeprefix("The most reasonable step of ").removesuffix(" is")
    return _question(f"What is the most reasonable step of {goal}?")


TASKS = {
    "social_iqa": _Source(file="social_iqa.json", ask=_question, about=lambda text: text.partition(".")[0]),
    "wikihow": _Source(file="wikihow_step_inference.json", ask=_goal, about=lambda text: text),
    "vitaminc": _Source(file="vitaminc_subset.json", ask=_claim, about=lambda text: text.partition(":")[0]),
}


def load_task(name: str, data: Path, *, seed: int = 0, validation: int = 250, test: int = 500) -> Task:
    """A task's questions, shuffled and split: test first, then validation, and what is left is for training.

    Sources are shuffled, not questions, so that no source is in two splits; a split ends with the first source that
    fills it, and may be a few questions larger than asked for.

    Args:
        name: one of `TASKS`.
        data: the folder of the files.
        seed: of the shuffle.
        validation: questions, at least.
        test: questions, at least.

    Raises:
        DataError: the task is unknown, its file is not there or not in the format, or has fewer questions than the
            splits take; every faulty question is named.
    """
    if name not in TASKS:
        raise DataError(f"task: expected one of {', '.join(TASKS)}; got {name!r}")
    source = TASKS[name]
    questions = read_questions(data / source.file, source.ask, source.about)
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.source, []).append(question)
    sources = sorted(groups)
    random.Random(seed).shuffle(sources)
    splits: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for about in sources:
        split = "test" if len(splits["test"]) < test else "validation"
        if split == "validation" and len(splits["validation"]) >= validation:
            split = "train"
        splits[split] += groups[about]
    if not splits["train"]:
        raise DataError(
            f"{data / source.file}: has {len(questions)} questions, and {test} for the test and {validation} for "
            "validation leave none for training; ask for smaller splits"
        )
    random.Random(seed).shuffle(splits["train"])
    return Task(name=name, **splits)


def read_questions(path: Path, ask: Callable[[str], str], about: Callable[[str], str]) -> list[Question]:
    """The questions of a file in BIG-bench's format, strictly.

    Args:
        path: JSON with `examples`, each with `input` and `target_scores` ({choice: 1 if right, else 0}).
        ask: the prompt of an input.
        about: what an input is about.

    Raises:
        DataError: the file is not such, or questions have no right answer or several, fewer than two choices, an empty
            one, one that stands twice, or an empty input; every one is named by its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
        examples = json.loads(text, object_pairs_hook=_distinct)["examples"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; --data is the folder of the accuracy study's files") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected JSON with a list `examples`; {error!r}") from error
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{path}: expected a list `examples`, not empty; got {type(examples).__name__}")
    questions, problems = [], []
    for number, example in enumerate(examples):
        try:
            questions.append(_read(example, ask, about))
        except DataError as error:
            problems.append(f"examples[{number}]: {error}")
    if problems:
        raise DataError(f"{path}: {len(problems)} questions cannot be asked:\n  " + "\n  ".join(problems))
    return questions


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; what stands twice is kept as a key that `_read` refuses."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key + " " if key in found else key] = value
    return found


def _read(example: Any, ask: Callable[[str], str], about: Callable[[str], str]) -> Question:
    text = example.get("input") if isinstance(example, dict) else None
    scores = example.get("target_scores") if isinstance(example, dict) else None
    if not isinstance(text, str) or not text.strip() or not isinstance(scores, dict):
        raise DataError(f"expected an `input` and `target_scores`; got {str(example)[:80]}")
    text = text.strip()
    if len(scores) < 2:
        raise DataError(f"expected at least two choices; got {len(scores)} for {text[:60]!r}")
    choices = [" ".join(choice.split()) for choice in scores]
    if not all(choices):
        raise DataError(f"expected choices that are not empty; one of {text[:60]!r} is")
    if len(set(choices)) < len(choices):
        raise DataError(f"expected choices that differ; two of {text[:60]!r} are equal")
    right = [number for number, score in enumerate(scores.values()) if score == 1]
    if len(right) != 1 or any(score not in (0, 1) for score in scores.values()):
        raise DataError(f"expected one right answer; {text[:60]!r} has {len(right)}")
    return Question(
        prompt=ask(text), choices=tuple(f" {choice}" for choice in choices), right=right[0], source=about(text)
    )
