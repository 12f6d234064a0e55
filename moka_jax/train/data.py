"""Examples from JSON lines: their tokens, and which of them are learned."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from moka_core import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
_SHOWN = 5
_NO_EXAMPLE = "expected at least one line with an example; the file has none"

# Some chat templates write today's date. A macro of that name hides the function, so that a run resumed tomorrow
# learns from the same tokens. (The empty expression keeps a newline with which the template itself may begin.)
_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One sequence of tokens and the part of it that is learned.

    Holds: tokens (length,) int32 and loss_mask (length,) bool, with 2 <= length; loss_mask[t] says that token t is
    learned from the tokens before it, so loss_mask[0] is False; some entry is True.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """The examples of one file.

    Args:
        path: the file.
        examples: in the order of its lines.
        pad_id: token that fills a batch up.
        cut: number of examples that were cut at `max_length` and so lost the end of what is learned.
        digest: SHA-256 of all tokens and masks.
    """

    path: str
    examples: tuple[Example, ...]
    pad_id: int
    cut: int
    digest: str

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(len(example.tokens) for example in self.examples)

    @property
    def largest_token(self) -> int:
        """The largest token id, padding included; the model's vocabulary must reach beyond it."""
        return max(self.pad_id, *(int(example.tokens.max()) for example in self.examples))

    def summary(self) -> dict[str, Any]:
        """Counts, as plain JSON values: examples, tokens, loss_tokens, longest, cut."""
        return {
            "examples": len(self.examples),
            "tokens": sum(len(example.tokens) for example in self.examples),
            "loss_tokens": sum(int(example.loss_mask.sum()) for example in self.examples),
            "longest": self.longest,
            "cut": self.cut,
        }


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A parsed line as texts to tokenise: `texts` are alternately a prompt so far and the same with its answer.

    `texts` of a plain example is the one text that is learned whole.
    """

    where: str
    texts: tuple[str, ...]
    chat: bool


class _LineProblem(Exception):
    """What is wrong with one line; collected into a DataError that lists several."""


def load_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    chat_template: bool = True,
    first: int | None = None,
) -> Dataset:
    """The examples of a JSON-lines file as tokens.

    A line is {"prompt": …, "completion": …}, {"messages": [{"role": …, "content": …}, …]} or {"text": …}. Learned are
    the completion, every assistant's message up to and including what the chat template writes after it, or the
    whole text; never a prompt. What follows the last assistant's message teaches nothing and is left out.

    Args:
        path: the file; blank lines are skipped.
        tokenizer: of the base model.
        max_length: an example longer than this is cut there; it is counted in `Dataset.cut` if that shortens
            what is learned.
        chat_template: write prompt and completion as messages if the tokenizer has a chat template; otherwise an
            example is the prompt, the completion and the end-of-text token, one after the other.
        first: read so many examples only; None: all.

    Raises:
        DataError: the file cannot be read or has no examples; a line is no such example; a prompt alone fills
            `max_length`; prompt and completion cannot be told apart in the tokens. One error counts all bad lines
            and shows the first few by file and line number.
    """
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None
    problems: list[str] = []
    lines: list[_Line] = []
    total = 0
    for where, raw in itertools.islice(_raw_lines(path), first):
        total += 1
        try:
            texts, chat = _texts(_parse(raw), tokenizer, template, chat_template)
            lines.append(_Line(where=where, texts=texts, chat=chat))
        except _LineProblem as problem:
            problems.append(f"{where}: {problem}")
    if not total:
        raise DataError(f"{path}: {_NO_EXAMPLE}")
    if any(not line.chat for line in lines) and tokenizer.eos_token_id is None:
        raise DataError(
            f"{path}: the tokenizer has no end-of-text token, so an answer would never end; "
            "set its eos_token, or use a tokenizer with a chat template"
        )
    examples = []
    cut = 0
    for line, ids in zip(lines, _tokenise(tokenizer, [line.texts for line in lines]), strict=True):
        try:
            tokens, mask = _mark_chat(ids) if line.chat else _mark_plain(ids, tokenizer)
            cut += bool(mask[max_length:].any())
            examples.append(_shorten(tokens, mask, max_length))
        except _LineProblem as problem:
            problems.append(f"{line.where}: {problem}")
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{path}: {len(problems)} of {total} examples cannot be used; correct these lines or take them out:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
    digest = hashlib.sha256()
    for example in examples:
        digest.update(
            len(example.tokens).to_bytes(8, "little") + example.tokens.tobytes() + example.loss_mask.tobytes()
        )
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Dataset(
        path=str(path),
        examples=tuple(examples),
        pad_id=next(int(pad) for pad in pads if pad is not None),
        cut=cut,
        digest=digest.hexdigest(),
    )


def check_readable(path: str | Path) -> None:
    """Raise a DataError unless a file can be read and has a line that is not blank; no more of it is read."""
    if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
        return  # what is read from a pipe is gone
    if next(_raw_lines(path), None) is None:
        raise DataError(f"{path}: {_NO_EXAMPLE}")


def _raw_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """("file:line", bytes) of every line that is not blank."""
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield f"{path}:{number}", raw
    except OSError as error:
        raise DataError(
            f"{path}: expected a JSON-lines file that can be read; {error}; data.train and data.eval name such files, "
            "relative to where the command runs"
        ) from error


def _parse(raw: bytes) -> dict[str, Any]:
    """The line as an object with the keys of one kind of example."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise _LineProblem(f"key {twice!r} is given twice")
        return dict(pairs)

    try:
        value = json.loads(raw.decode("utf-8").strip(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise _LineProblem(f"expected UTF-8; byte {error.start} is not") from None
    except json.JSONDecodeError as error:
        raise _LineProblem(f"not valid JSON: {error.msg} at column {error.colno}; one line is one example") from None
    except (ValueError, RecursionError) as error:  # a number too long for Python; lists inside of lists inside of …
        raise _LineProblem(f"JSON that cannot be read: {error}; an example is one object of texts") from None
    if not isinstance(value, dict):
        raise _LineProblem(f"expected an object such as {{'prompt': …, 'completion': …}}; got {_short(value)}")
    kinds = [kind for kind in (("prompt", "completion"), ("messages",), ("text",)) if set(kind) & set(value)]
    if len(kinds) != 1:
        got = f"keys of {len(kinds)} kinds" if kinds else "none of these"
        raise _LineProblem(
            "expected the keys 'prompt' and 'completion', or 'messages', or 'text'; "
            f"got {got}: {', '.join(sorted(map(repr, value))) or 'no keys'}"
        )
    _check_line_keys(value, kinds[0], "")
    return value


def _check_line_keys(value: Mapping[str, Any], expected: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(value) - set(expected))
    missing = [name for name in expected if name not in value]
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing or expected, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _LineProblem(f"{where}unknown key {unknown[0]!r}{hint}; expected {' and '.join(map(repr, expected))}")
    if missing:
        raise _LineProblem(f"{where}missing key {missing[0]!r}")


def _texts(
    value: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None, chat_template: bool
) -> tuple[tuple[str, ...], bool]:
    """The texts of a line (see `_Line`), and whether the chat template wrote them."""
    if "text" in value:
        return (_string("text", value["text"], empty_ok=False),), False
    if "messages" in value:
        if template is None or not chat_template:
            why = "the tokenizer has none" if template is None else "data.chat_template is false"
            raise _LineProblem(f"'messages' need a chat template, but {why}; use 'prompt' and 'completion'")
        return _chat_texts(_messages(value["messages"]), tokenizer, template), True
    prompt = _string("prompt", value["prompt"], empty_ok=True)
    completion = _string("completion", value["completion"], empty_ok=False)
    if template is None or not chat_template:
        return (prompt, prompt + completion), False
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _chat_texts(messages, tokenizer, template), True


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _LineProblem(f"'messages': expected a list of {{'role', 'content'}}; got {_short(value)}")
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _LineProblem(f"{where}: expected an object with 'role' and 'content'; got {_short(message)}")
        _check_line_keys(message, ("role", "content"), f"{where}: ")
        if message["role"] not in ROLES:
            raise _LineProblem(f"{where}: expected a role of {', '.join(ROLES)}; got {_short(message['role'])}")
        _string(f"{where}: content", message["content"], empty_ok=message["role"] != "assistant")
    roles = [message["role"] for message in value]
    if "assistant" not in roles:
        raise _LineProblem("'messages': expected at least one by the assistant, since only those are learned; got none")
    if roles[0] == "assistant":
        raise _LineProblem("'messages': expected a user's message before the first of the assistant")
    return value


def _chat_texts(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, ...]:
    """For every assistant's message, what the template writes before it and what it writes up to its end."""

    def write(upto: int, *, prompt: bool) -> str:
        return chat_text(messages[:upto], tokenizer, template, prompt=prompt)

    try:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return tuple(text for turn in turns for text in (write(turn, prompt=True), write(turn + 1, prompt=False)))
    except DataError as error:
        raise _LineProblem(str(error)) from None


def chat_text(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, template: str, *, prompt: bool
) -> str:
    """What a chat template writes for messages, in training and in generation alike.

    Args:
        template: of `tokenizer.get_chat_template()`.
        prompt: add what comes before an assistant's answer.

    Raises:
        DataError: the template refuses these messages, or fails.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=_FIXED_DATE + template, tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses these messages: {error}") from error
    except Exception as error:  # a template is a program of somebody else's, and may fail in any way
        raise DataError(
            f"the tokenizer's chat template fails on these messages: {type(error).__name__}: {error}; correct the "
            "template, or do without it (data.chat_template: false, generate --raw)"
        ) from error
    assert isinstance(text, str)
    return text


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, ...]]) -> Iterator[list[list[int]]]:
    """The token ids of every text, in one call of the tokenizer, without the special tokens that it would add."""
    flat = [text for group in texts for text in group]
    if not flat:
        return
    ids = iter(tokenizer(flat, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    for group in texts:
        yield [next(ids) for _ in group]


def _mark_chat(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a conversation from the ids of its growing prefixes."""
    whole = ids[-1]
    mask = np.zeros(len(whole), bool)
    for before, upto in zip(ids[::2], ids[1::2], strict=True):
        for prefix in (before, upto):
            if whole[: len(prefix)] != prefix:
                at = _first_difference(whole, prefix)
                raise _LineProblem(
                    "the tokenizer's chat template rewrites earlier text when an answer follows: its tokens differ "
                    f"from token {at} on, so prompt and answer cannot be told apart; use another template, or "
                    "'prompt' and 'completion' with data.chat_template: false"
                )
        if len(upto) <= len(before):
            raise _LineProblem("the tokenizer's chat template writes nothing for an assistant's message")
        mask[len(before) : len(upto)] = True
    return np.array(whole, np.int32), mask


def _mark_plain(ids: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a text, or of a prompt and its completion: start token if any, ids, end-of-text token."""
    prompt, whole = ([], ids[0]) if len(ids) == 1 else ids
    if whole[: len(prompt)] != prompt:
        raise _LineProblem(
            f"prompt and completion share a token (token {_first_difference(whole, prompt)} of the prompt); "
            "move white space from the end of the prompt to the start of the completion"
        )
    start = start_tokens(tokenizer)
    tokens = np.array([*start, *whole, tokenizer.eos_token_id], np.int32)
    mask = np.ones(len(tokens), bool)
    mask[: max(1, len(start) + len(prompt))] = False
    return tokens, mask


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a text that no chat template wrote, in training and in generation alike.

    The start token if the tokenizer writes one. What else it would add, such as an end token, would tell the model that
    a prompt is over before its answer has begun.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []


def _shorten(tokens: np.ndarray, mask: np.ndarray, max_length: int) -> Example:
    if not mask[:max_length].any():
        prompt = int(mask.argmax())
        raise _LineProblem(
            f"the prompt alone has {prompt} tokens and data.max_length is {max_length}, so nothing is left of what "
            f"should be learned ({int(mask.sum())} tokens); raise data.max_length above {prompt}, or shorten the prompt"
        )
    return Example(tokens=tokens[:max_length], loss_mask=mask[:max_length])


def _string(name: str, value: Any, *, empty_ok: bool) -> str:
    if not isinstance(value, str):
        raise _LineProblem(f"{name}: expected text; got {_short(value)}")
    if not empty_ok and not value.strip():
        raise _LineProblem(f"{name}: expected text to learn; got {_short(value)}")
    if problem := text_problem(value):
        raise _LineProblem(f"{name}: {problem}")
    return value


def text_problem(text: str) -> str | None:
    """Why no tokenizer can read a text, if it is so, in training and in generation alike."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "holds half of a surrogate pair, which is no character"
    return None


def _first_difference(whole: list[int], prefix: list[int]) -> int:
    pairs = zip(whole, prefix, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(whole), len(prefix)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
