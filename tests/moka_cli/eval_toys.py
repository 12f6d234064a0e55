"""Small tasks of lm-eval with data of their own, for the tests of `moka eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moka_cli.eval_checks import Limits

WORDS = ["one", "two", "three", "red", "green", "blue", "seven", "a hill", "the sea"]
FEW = Limits(context=256, vocabulary=320)


def task(folder: Path, name: str, rows: list[dict[str, Any]], **settings: Any) -> Path:
    """A task's YAML, and its data beside it; a question's keys are q, choices and label, unless settings say so."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        **settings,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return file


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a question each, with three choices and the number of the right one."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        choices = [str(word) for word in rng.choice(WORDS, 3, replace=False)]
        subject = " ".join(rng.choice(WORDS, 1 + number % 4))
        rows.append({"q": f"Q: {subject}?\nA:", "choices": choices, "label": int(rng.integers(3))})
    return rows
