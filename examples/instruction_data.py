"""What both training scripts do before they train: check their options, read the data, make tokens of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not learned

Tokens = dict[str, list[int]]


def model_folder(folder: Path) -> Path:
    """The folder of an option that names a model; without this check, transformers would look for it on the Hub."""
    if not (folder / "config.json").is_file():
        found = "there is none in it" if folder.is_dir() else "it is a file" if folder.exists() else "it does not exist"
        hint = "To get a model of the Hub: hf download NAME --local-dir FOLDER"
        raise typer.BadParameter(f"expected a folder with config.json; got {folder}: {found}. {hint}")
    return folder


def read_rows(path: Path) -> list[dict[str, str]]:
    """The examples of a file, one a line."""
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                expected = f'{path}:{number}: expected {{"prompt": "…", "completion": "…"}}'
                try:
                    text = line.decode("utf-8-sig").strip()
                    row = json.loads(text)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{expected} in UTF-8; got another encoding: {error.reason}") from None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{expected}; got broken JSON: {error.msg}, column {error.colno}") from None
                if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("prompt", "completion")):
                    raise ValueError(f"{expected}; got {text[:80]}")
                rows.append({"prompt": row["prompt"], "completion": row["completion"]})
    if len(rows) < 2:
        raise ValueError(f"{path}: expected two lines or more, to learn from some and hold some out; got {len(rows)}")
    return rows


def split(examples: list[Any], held_out: int, seed: int) -> tuple[list[Any], list[Any]]:
    """(to learn from, held out), by a fixed shuffle."""
    if not 0 < held_out < len(examples):
        raise ValueError(f"--held-out: expected 1 to {len(examples) - 1}, fewer than there are lines; got {held_out}")
    shuffled = random.Random(seed).sample(examples, len(examples))
    return shuffled[held_out:], shuffled[:held_out]


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """Tokens of each example, cut at max_length, and their labels, which are IGNORED for the prompt."""
    pairs = [prompt_and_answer(row, tokenizer) for row in rows]
    prompts = [len(prompt) for prompt, _ in pairs]
    if max(prompts) >= max_length:
        raise ValueError(
            f"--max-length {max_length}: {sum(length >= max_length for length in prompts)} of {len(rows)} prompts have "
            f"that many tokens or more, so nothing would be learned from them; expected more than {max(prompts)}, the "
            "longest prompt's; raise it, or leave those lines out"
        )
    return [
        {
            "input_ids": [*prompt, *answer][:max_length],
            "labels": [*[IGNORED] * len(prompt), *answer][:max_length],
        }
        for prompt, answer in pairs
    ]


def prompt_and_answer(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that are read and those that are learned.

    With a chat template, prompt and completion are messages; without, the completion ends with the end-of-text token.
    They become tokens apart from each other, so that the prompt's are those that the model is asked with later.
    """
    if tokenizer.chat_template is None:
        # a start token if there is one, but no end token, which some tokenizers add: the answer is still to come
        start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
        prompt = start + tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        return prompt, tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    asked = str(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if not whole.startswith(asked):
        raise ValueError("chat_template: it writes a prompt otherwise once an answer follows; use another template")
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    return prompt, tokenizer(whole.removeprefix(asked), add_special_tokens=False)["input_ids"]
