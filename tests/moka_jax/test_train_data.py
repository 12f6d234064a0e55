"""Examples: which tokens are learned, what is refused by which message, and the order of batches."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moka_core import DataError
from moka_jax.train.batches import collate, eval_batches, train_batches
from moka_jax.train.data import Dataset, Example, load_dataset
from tests.moka_jax.train_toys import TEMPLATE, make_tokenizer, write_data, write_lines


def load(tmp_path: Path, lines: list[Any], *, template: str | None = TEMPLATE, **options: Any) -> Dataset:
    return load_dataset(write_lines(tmp_path / "d.jsonl", lines), make_tokenizer(template), **options)


def split(example: Example) -> list[tuple[bool, str]]:
    """The example as (learned, text) pieces."""
    pieces: list[tuple[bool, list[int]]] = []
    for token, learned in zip(example.tokens.tolist(), example.loss_mask.tolist(), strict=True):
        if not pieces or pieces[-1][0] != learned:
            pieces.append((learned, []))
        pieces[-1][1].append(token)
    tokenizer = make_tokenizer()
    return [(learned, tokenizer.decode(ids)) for learned, ids in pieces]


def test_of_prompt_and_completion_the_answer_and_its_end_are_learned(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"prompt": "2+2?", "completion": "4 é"}]).examples
    assert split(example) == [
        (False, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "4 é<|im_end|>\n"),
    ]
    assert example.tokens.dtype == np.int32
    assert example.loss_mask.dtype == bool


def test_of_messages_every_turn_of_the_assistant_is_learned(tmp_path: Path) -> None:
    turns = [
        ("system", "be brief"),
        ("user", "a?"),
        ("assistant", "A"),
        ("user", "b?"),
        ("assistant", "B"),
        ("user", "?"),
    ]
    (example,) = load(tmp_path, [{"messages": [{"role": r, "content": c} for r, c in turns]}]).examples
    assert split(example) == [
        (
            False,
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (True, "A<|im_end|>\n"),
        (False, "<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "B<|im_end|>\n"),
    ]


def test_without_a_template_the_completion_and_the_end_of_text_are_learned(tmp_path: Path) -> None:
    lines = [{"prompt": "Q: 2+2?\nA:", "completion": " 4"}]
    for data in (load(tmp_path, lines, template=None), load(tmp_path, lines, chat_template=False)):
        assert split(data.examples[0]) == [(False, "Q: 2+2?\nA:"), (True, " 4</s>")]


def test_a_text_is_learned_whole_but_for_its_first_token(tmp_path: Path) -> None:
    (example,) = load(tmp_path, [{"text": "abc"}]).examples
    assert split(example) == [(False, "a"), (True, "bc</s>")]


def test_the_start_token_is_written_if_the_tokenizer_writes_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"text": "ab"}, {"prompt": "p", "completion": "c"}])
    data = load_dataset(path, make_tokenizer(None, bos=True))
    assert [split(e) for e in data.examples] == [
        [(False, "<s>"), (True, "ab</s>")],
        [(False, "<s>p"), (True, "c</s>")],
    ]


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %B %Y') }} " + TEMPLATE
    (example,) = load(tmp_path, [{"prompt": "p", "completion": "c"}], template=dated).examples
    assert split(example)[0][1].startswith("26 Jul 2024 <|im_start|>user")


def test_a_cut_completion_is_kept_and_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "ab", "completion": "cde"}]
    data = load(tmp_path, lines, template=None, max_length=6)
    assert [split(e) for e in data.examples] == [[(False, "ab"), (True, "cdef")], [(False, "ab"), (True, "cde</s>")]]
    assert data.summary() == {"examples": 2, "tokens": 12, "loss_tokens": 8, "longest": 6, "cut": 1}


def test_a_prompt_that_fills_the_length_is_refused_with_numbers(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    lines = [good] + [{"prompt": "x" * n, "completion": "yes"} for n in range(6, 14)]
    with pytest.raises(DataError) as caught:
        load(tmp_path, lines, template=None, max_length=6)
    message = str(caught.value)
    assert "8 of 9 examples cannot be used" in message
    assert "… and 3 more" in message
    assert (
        "d.jsonl:2: the prompt alone has 6 tokens and data.max_length is 6, so nothing is left of what should be "
        "learned (4 tokens); raise data.max_length above 6, or shorten the prompt"
    ) in message
    assert message.count("d.jsonl:") == 1 + 5  # the title and the first five


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not valid JSON: Expecting value at column 9"),
        ("[" * 100_000, "JSON that cannot be read: maximum recursion depth exceeded"),
        ('{"text": ' + "1" * 5000 + "}", "JSON that cannot be read: Exceeds the limit"),
        ("[1]", "expected an object such as {'prompt': …, 'completion': …}; got [1]"),
        ('{"text": "a", "text": "b"}', "key 'text' is given twice"),
        ({}, "expected the keys 'prompt' and 'completion', or 'messages', or 'text'; got none of these: no keys"),
        ({"input": "a"}, "got none of these: 'input'"),
        ({"text": "a", "prompt": "b"}, "got keys of 2 kinds: 'prompt', 'text'"),
        ({"prompt": "a"}, "missing key 'completion'"),
        ({"prompt": "a", "completio": "b"}, "unknown key 'completio' (did you mean 'completion'?)"),
        ({"text": "a", "id": 1}, "unknown key 'id'; expected 'text'"),
        ({"text": 3}, "text: expected text; got 3"),
        ({"text": " \n"}, "text: expected text to learn; got ' \\n'"),
        ({"prompt": "a", "completion": ""}, "completion: expected text to learn; got ''"),
        ({"prompt": None, "completion": "a"}, "prompt: expected text; got None"),
        ('{"text": "a\\ud800"}', "text: holds half of a surrogate pair"),
        ({"messages": []}, "'messages': expected a list of {'role', 'content'}; got []"),
        ({"messages": ["hi"]}, "messages[0]: expected an object with 'role' and 'content'; got 'hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0]: missing key 'content'"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0]: unknown key 'name'"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0]: expected a role of system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "expected at least one by the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected a user's message before the first"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            "messages[1]: content: expected text to learn; got ''",
        ),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(tmp_path, [{"text": "good"}, "", line])
    assert "d.jsonl:3: " in str(caught.value)
    assert "1 of 2 examples" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"d.jsonl:2: expected UTF-8; byte 10 is not"):
        load_dataset(path, make_tokenizer())


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_a_file_without_examples_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"expected at least one line with an example; the file has none"):
        load_dataset(tmp_path / "d.jsonl", make_tokenizer())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: expected a JSON-lines file that can be read"):
        load_dataset(tmp_path / "none.jsonl", make_tokenizer())


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_messages_need_a_template(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'messages' need a chat template, but the tokenizer has none"):
        load(tmp_path, [CHAT], template=None)
    with pytest.raises(DataError, match=r"'messages' need a chat template, but data.chat_template is false"):
        load(tmp_path, [CHAT], chat_template=False)


def test_a_template_that_rewrites_earlier_text_is_refused(tmp_path: Path) -> None:
    counting = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(DataError, match=r"d.jsonl:1: .* template rewrites earlier text .* token 0 on"):
        load(tmp_path, [CHAT], template=counting)
    forgets = "{% for m in messages[-1:] %}{{ m.content }}|{% endfor %}"
    with pytest.raises(DataError, match=r"rewrites earlier text"):
        load(tmp_path, [CHAT], template=forgets)


def test_a_template_that_says_no_is_reported(tmp_path: Path) -> None:
    strict = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(DataError, match=r"d.jsonl:1: .* template refuses these messages: no system messages here"):
        load(tmp_path, [CHAT], template=strict)


def test_a_template_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.jsonl:1: .* template fails on these messages: ZeroDivisionError: division"):
        load(tmp_path, [CHAT], template="{{ 1 / 0 }}")


def test_a_template_without_the_answer_is_refused(tmp_path: Path) -> None:
    mute = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"writes nothing for an assistant's message"):
        load(tmp_path, [CHAT], template=mute)


def test_a_prompt_that_melts_into_its_completion_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None, merges=(("Ġ", "4"),))
    joined = write_lines(tmp_path / "joined.jsonl", [{"prompt": "A: ", "completion": "4"}])
    with pytest.raises(DataError, match=r"joined.jsonl:1: prompt and completion share a token .* move white space"):
        load_dataset(joined, tokenizer)
    apart = write_lines(tmp_path / "apart.jsonl", [{"prompt": "A:", "completion": " 4"}])
    assert load_dataset(apart, tokenizer).examples[0].loss_mask.tolist() == [False, False, True, True]


def test_a_tokenizer_without_an_end_is_refused_for_plain_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-text token"):
        load_dataset(write_lines(tmp_path / "d.jsonl", [{"text": "a"}]), tokenizer)
    assert len(load_dataset(write_lines(tmp_path / "c.jsonl", [CHAT]), tokenizer).examples) == 1


def test_the_digest_tells_tokens_and_masks_apart(tmp_path: Path) -> None:
    one = load(tmp_path, [{"prompt": "ab", "completion": "c"}], template=None)
    same = load(tmp_path, [json.dumps({"completion": "c", "prompt": "ab"})], template=None)
    other_mask = load(tmp_path, [{"prompt": "a", "completion": "bc"}], template=None)
    assert one.digest == same.digest
    assert one.examples[0].tokens.tolist() == other_mask.examples[0].tokens.tolist()
    assert one.digest != other_mask.digest


def example(length: int, start: int = 10) -> Example:
    mask = np.arange(length) >= 2
    return Example(tokens=np.arange(start, start + length, dtype=np.int32), loss_mask=mask)


def test_targets_are_the_next_tokens_and_padding_counts_nothing() -> None:
    batch = collate([example(5), example(3, start=50)], pad_id=9, longest=5, rows=3)
    assert {name: array.shape for name, array in batch.items()} == {
        "tokens": (3, 32),
        "targets": (3, 32),
        "loss_mask": (3, 32),
        "lengths": (3,),
    }
    assert batch["tokens"][0, :7].tolist() == [10, 11, 12, 13, 14, 9, 9]
    assert batch["targets"][0, :7].tolist() == [11, 12, 13, 14, 9, 9, 9]
    assert np.flatnonzero(batch["loss_mask"][0]).tolist() == [1, 2, 3]
    assert np.flatnonzero(batch["loss_mask"][1]).tolist() == [1]
    assert not batch["loss_mask"][2].any()
    assert batch["lengths"].tolist() == [5, 3, 0]


@pytest.mark.parametrize(
    ("length", "longest", "time"),
    [(5, 400, 32), (32, 400, 32), (33, 400, 64), (65, 400, 128), (70, 96, 96), (97, 97, 128)],
)
def test_lengths_are_few(length: int, longest: int, time: int) -> None:
    assert collate([example(length)], pad_id=0, longest=longest)["tokens"].shape == (1, time)


def dataset(tmp_path: Path) -> Dataset:
    return load_dataset(write_data(tmp_path)[0], make_tokenizer())


def rows(batch: dict[str, np.ndarray]) -> list[bytes]:
    """Each example of a batch without its padding."""
    tokens = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
    return [row[:n].tobytes() for row, n in zip(tokens, batch["lengths"].ravel(), strict=True)]


def test_every_pass_shows_every_example_once_in_a_new_order(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    batches = train_batches(data, batch_size=1, accumulate=1, seed=0)
    first, second = ([rows(next(batches))[0] for _ in range(13)] for _ in range(2))
    whole = sorted(example.tokens.tobytes() for example in data.examples)
    assert sorted(first) == whole
    assert sorted(second) == whole
    assert first != second
    other = train_batches(data, batch_size=1, accumulate=1, seed=1)
    assert [rows(next(other))[0] for _ in range(13)] != first


def test_two_by_three_examples_are_those_of_one_by_six(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    split_, whole = (train_batches(data, batch_size=b, accumulate=a, seed=5) for a, b in ((2, 3), (1, 6)))
    for _ in range(5):
        two, one = next(split_), next(whole)
        assert two["tokens"].shape[:2] == (2, 3)
        assert two["lengths"].shape == (2, 3)
        assert one["tokens"].shape[:2] == (1, 6)
        assert rows(two) == rows(one)


def test_the_position_in_the_data_can_be_resumed(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    batches = train_batches(data, batch_size=3, accumulate=2, seed=0)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    ahead = [rows(next(batches)) for _ in range(3)]
    resumed = train_batches(data, batch_size=3, accumulate=2, seed=0)
    resumed.set_state(state)
    assert [rows(next(resumed)) for _ in range(3)] == ahead


def test_evaluation_drops_no_example(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    batches = list(eval_batches(data, batch_size=4))
    assert [batch["tokens"].shape[0] for batch in batches] == [4, 4, 4, 4]
    seen = [row for batch in batches for row in rows(batch) if row]
    assert seen == [example.tokens.tobytes() for example in data.examples]
    assert sum(int(batch["loss_mask"].sum()) for batch in batches) == data.summary()["loss_tokens"]
    assert len(list(eval_batches(data, batch_size=4, limit=2))) == 2
