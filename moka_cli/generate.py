"""`moka generate`: completions in JAX, of one prompt as it comes, or of many in batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from moka_cli.bases import open_held
from moka_cli.figures import check_json, is_standard_output, json_lines
from moka_cli.train import load_model, load_tokenizer
from moka_core import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moka_jax.llama import Llama


def run_generate(
    base: Path,
    prompts: Sequence[str],
    *,
    prompts_file: Path | None,
    adapter: Path | None,
    allow_other_base: bool,
    quantise: str | None,
    max_new_tokens: int,
    batch_size: int,
    raw: bool,
    json_file: Path | None,
    settings: dict[str, Any],
) -> None:
    """Print the completion of every prompt.

    Args:
        prompts, prompts_file: those of the file come after the others.
        allow_other_base: take an adapter that was trained on another base model.
        batch_size: how many prompts are read at once; the completions do not depend on it.
        json_file: where a JSON object for each prompt goes, a line each; "-": to standard output, and nothing else.
        settings: the fields of `moka_jax.llama.Sampling`.
    """
    from conversion import load_adapter
    from moka_core import check_base
    from moka_jax import import_adapter
    from moka_jax.llama import LlamaConfig, Sampling, check_prompts
    from moka_jax.train.data import text_problem

    check_json(json_file)
    # everything that can be refused is refused before the weights are read
    sampling = Sampling(**settings)
    if batch_size < 1:
        raise ConfigError(f"batch-size: expected at least 1; got {batch_size}")
    for number, prompt in enumerate(prompts, start=1):
        if problem := text_problem(prompt):
            raise DataError(f"--prompt, number {number}: {problem}")
    texts = [*prompts, *([] if prompts_file is None else read_prompts(prompts_file))]
    if not texts:
        raise DataError("nothing to complete: expected --prompt TEXT or --prompts FILE")
    value = None if adapter is None else load_adapter(adapter)
    opened = open_held(base, quantise, value)
    tokenizer = load_tokenizer(base)
    config = LlamaConfig.from_hf_config(opened.config)
    if value is not None:
        check_base(value.base_fingerprint, opened.fingerprint, allow_other_base=allow_other_base)
    rows = [prompt_tokens(tokenizer, text, raw=raw) for text in texts]
    check_prompts(config, rows, max_new_tokens=max_new_tokens, single=len(rows) == 1)
    ask = {"max_new_tokens": max_new_tokens, "stop_tokens": stop_tokens(tokenizer, base), "sampling": sampling}
    progress = Console(stderr=True)
    with progress.status(f"loading {escape(str(base))}"):
        model = load_model(base, quantise=opened.quantisation)
        if value is not None:
            import_adapter(model, value, allow_other_base=allow_other_base)
    if len(rows) == 1 and json_file is None:
        _print_as_it_comes(model, tokenizer, rows[0], ask)
        return
    with json_lines(json_file) as write:
        for start in range(0, len(rows), batch_size):
            indices = range(start, min(start + batch_size, len(rows)))
            with progress.status(f"completing {indices[0] + 1} to {indices[-1] + 1} of {len(rows)}"):
                completions = _complete(model, rows, indices, ask)
            for index, new in zip(indices, completions, strict=True):
                completion = tokenizer.decode(new, skip_special_tokens=True)
                ended = "stop" if len(new) < max_new_tokens else "length"
                if not is_standard_output(json_file):
                    title = f"--- {index + 1} of {len(texts)}: {texts[index]}\n" if len(rows) > 1 else ""
                    print(f"{title}{completion}", flush=True)
                write({"prompt": texts[index], "completion": completion, "tokens": new, "ended": ended})


def _print_as_it_comes(
    model: Llama, tokenizer: PreTrainedTokenizerBase, tokens: list[int], ask: dict[str, Any]
) -> None:
    from moka_jax.llama import stream

    text = TextPieces(tokenizer)
    for token in stream(model, tokens, **ask):
        print(text.add(token), end="", flush=True)
    print(text.rest())


def _complete(model: Llama, rows: list[list[int]], indices: range, ask: dict[str, Any]) -> list[list[int]]:
    """The new tokens of some rows; a row's draws go by its number among all, so batches do not matter."""
    from moka_jax.llama import generate

    return generate(model, [rows[index] for index in indices], row_keys=indices, **ask)


class TextPieces:
    """The text of tokens that come one by one, in pieces that are never part of a character.

    The pieces together are `tokenizer.decode(tokens, skip_special_tokens=True)`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode = lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
        self._tokens: list[int] = []
        self._shown = 0  # how many of the tokens have been given out as text

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks some of its bytes."""
        self._tokens.append(token)
        piece = self._piece()
        if not piece or piece.endswith("\ufffd"):
            return ""
        # a few tokens remain, since a tokenizer may write one in another way at the start of a text
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)
        return piece

    def rest(self) -> str:
        """What has not been given out: bytes that never became a character."""
        return self._piece()

    def _piece(self) -> str:
        before = self._decode(self._tokens[: self._shown])
        return self._decode(self._tokens)[len(before) :]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file: one a line, or, if it ends in .jsonl, a JSON string or an object with "prompt" a line.

    Empty lines are left out; other fields of an object, such as a data set's "completion", are not read.

    Raises:
        DataError: the file cannot be read or holds no prompt, or lines are not as expected (all are listed).
    """
    from moka_jax.train.data import text_problem

    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: expected a text file with one prompt a line; {error}") from error
    prompts, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: Any = line.removesuffix("\r")
        if file.suffix == ".jsonl":
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter from lists inside of lists inside of lists …
                problems.append(f"line {number}: expected JSON; {error}")
                continue
            prompt = found.get("prompt") if isinstance(found, dict) else found
            if not isinstance(prompt, str):
                problems.append(
                    f'line {number}: expected a JSON string, or an object with a string "prompt"; got {found!r}'
                )
                continue
            if problem := text_problem(prompt):
                problems.append(f"line {number}: {problem}")
                continue
        prompts.append(prompt)
    if problems:
        raise DataError(f"{file}: " + "; ".join(problems))
    if not prompts:
        raise DataError(f"{file}: expected at least one prompt; the file is empty")
    return prompts


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool = False) -> list[int]:
    """The tokens that the model reads: the prompt as a user's message if the tokenizer has a chat template."""
    from moka_jax.train.data import chat_text, start_tokens

    start, text = start_tokens(tokenizer), prompt
    if not raw and tokenizer.chat_template is not None:
        message = [{"role": "user", "content": prompt}]
        start, text = [], chat_text(message, tokenizer, tokenizer.get_chat_template(), prompt=True)
    return [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, base: Path | None = None) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model's folder names."""
    from moka_jax.llama import folder_stop_tokens

    named = [] if base is None else folder_stop_tokens(base)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *named]))
