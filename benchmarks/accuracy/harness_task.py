"""The test split of a task of the study for lm-evaluation-harness: the same questions, prompts and tokens.

    python -m benchmarks.accuracy.harness_task --data ../shared/data --task social_iqa --out FOLDER
    moka eval ADAPTER --base report/base --tasks FOLDER/social_iqa.yaml

Its acc and acc_norm are `Scores.accuracy` without and with `normalised`: lm-eval, too, takes the first of equals, and
divides by the characters of a choice without the space before it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.accuracy.tasks import TASKS, Question, load_task
from moka_core import DataError


def main(argv: Sequence[str] | None = None) -> None:
    """Write the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks' files")
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args(argv)
    try:
        questions = load_task(arguments.task, arguments.data).test
    except DataError as error:
        parser.error(str(error))
    print(write_task(arguments.out, f"study_{arguments.task}", questions, file=f"{arguments.task}.yaml"))


def write_task(folder: Path, name: str, questions: Sequence[Question], *, file: str = "task.yaml") -> Path:
    """The questions as JSON lines, and the YAML that lm-eval reads, whose path comes back.

    Args:
        name: of the task; not one of lm-eval's own.

    Raises:
        DataError: a choice does not begin with one space, which lm-eval is told to put before each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions:
        for choice in question.choices:
            if choice != f" {choice.strip()}":
                raise DataError(f"expected choices that begin with one space; got {choice!r} for {question.prompt!r}")
    data = (folder / file).resolve().with_suffix(".jsonl")
    rows = [
        {"prompt": question.prompt, "choices": [choice[1:] for choice in question.choices], "right": question.right}
        for question in questions
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
    (folder / file).write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return folder / file


if __name__ == "__main__":
    main()
