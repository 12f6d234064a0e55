"""What both scripts refuse, and how: before a model is loaded, with a message that says what to change."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import instruction_data
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.examples.printed import message
from tests.moka_jax.train_toys import make_tokenizer

SCRIPTS = Path(instruction_data.__file__).parent
ROW = {"prompt": "add 1 1", "completion": "gives 2"}


@pytest.fixture(params=["qlora_trainer", "sft_trainer"])
def run(request, base, data, tmp_path, monkeypatch):
    """run(**options): the script on good data, but for these options; it may not get so far as to load the base."""
    if request.param == "sft_trainer":
        pytest.importorskip("trl")
    script = importlib.import_module(request.param)
    monkeypatch.setattr(script, "load_4bit", lambda folder: pytest.fail("the base is loaded"))

    def run(**options):
        values = {"model": base, "data": data, "output": tmp_path / "run", "held_out": 8, **options}
        words = [word for name, value in values.items() for word in ("--" + name.replace("_", "-"), str(value))]
        done = CliRunner().invoke(script.app, words, env={"COLUMNS": "200"})
        assert done.exit_code, done.output
        assert not (tmp_path / "run").exists()
        return message(done.output) if isinstance(done.exception, SystemExit) else str(done.exception)

    return run


@pytest.mark.parametrize("name", ["steps", "evaluations", "batch_size", "accumulate"])
def test_counts_begin_at_one(run, name):
    assert f"Invalid value for '--{name.replace('_', '-')}'" in run(**{name: 0})


def test_a_base_that_is_no_folder_of_a_model_is_not_looked_for_on_the_hub(run, data, tmp_path):
    for path, found in {"typo": "it does not exist", data: "it is a file", tmp_path: "there is none in it"}.items():
        said = run(model=path)
        assert "Invalid value for '--model': expected a folder with config.json; got" in said
        assert f"{found}. To get a model of the Hub: hf download NAME --local-dir FOLDER" in said


def test_data_that_is_no_file_is_refused(run, tmp_path):
    assert "Invalid value for '--data'" in run(data="typo.jsonl")
    assert "Invalid value for '--data'" in run(data=tmp_path)


def test_prompts_that_leave_no_room_for_an_answer_are_counted(run, base, data):
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [len(instruction_data.prompt_and_answer(row, tokenizer)[0]) for row in instruction_data.read_rows(data)]
    longest, many = max(prompts), prompts.count(max(prompts))
    assert 0 < many < len(prompts)
    said = run(max_length=longest)
    assert f"--max-length {longest}: {many} of 40 prompts have that many tokens or more" in said
    assert f"expected more than {longest}, the longest prompt's; raise it, or leave those lines out" in said
    assert "--max-length 10: 40 of 40 prompts" in run(max_length=10)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_no_end_token_stands_between_a_plain_prompt_and_its_answer(bos, eos):
    tokenizer = make_tokenizer(None, bos=bos, eos=eos)
    prompt, answer = instruction_data.prompt_and_answer(ROW, tokenizer)
    assert tokenizer.decode(prompt) == "<s>" * bos + ROW["prompt"]
    assert tokenizer.decode(answer) == ROW["completion"] + "</s>"


@pytest.mark.parametrize("held_out", [0, 40, 64])
def test_something_is_held_out_and_something_is_left(run, held_out):
    said = run(held_out=held_out)
    assert said == f"--held-out: expected 1 to 39, fewer than there are lines; got {held_out}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "a"}', '; got {"prompt": "a"}'),
        (b'{"prompt": "a", "completion": 3}', '; got {"prompt": "a", "completion": 3}'),
        (b'["x"]', '; got ["x"]'),
        (b"null", "; got null"),
        (b'{"prompt": "a",', "; got broken JSON: Expecting property name enclosed in double quotes, column 16"),
        (b'{"prompt": "\xe9", "completion": "b"}', " in UTF-8; got another encoding: invalid continuation byte"),
    ],
)
def test_a_bad_line_is_named(run, tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n\n" + line + b"\n")
    assert run(data=path) == f'{path}:3: expected {{"prompt": "…", "completion": "…"}}{expected}'


@pytest.mark.parametrize("lines", [0, 1])
def test_a_file_too_short_to_split_is_refused(run, tmp_path, lines):
    path = tmp_path / "short.jsonl"
    path.write_text((json.dumps(ROW) + "\n") * lines)
    assert run(data=path) == f"{path}: expected two lines or more, to learn from some and hold some out; got {lines}"


def test_a_line_ends_where_json_lines_end(tmp_path):
    """Not at every character that str.splitlines takes for an end; a byte-order mark is no part of the first."""
    rows = [{"prompt": "one\u2028two", "completion": "\x85"}, ROW]
    text = "\ufeff" + "\r\n".join(json.dumps({**row, "id": 1}, ensure_ascii=False) for row in rows)
    (tmp_path / "data.jsonl").write_bytes(text.encode())
    assert instruction_data.read_rows(tmp_path / "data.jsonl") == rows


def test_completions_alone_are_learned(base):
    def learned(example):
        return tokenizer.decode([token for token in example["labels"] if token != instruction_data.IGNORED])

    tokenizer = AutoTokenizer.from_pretrained(base)
    (example,) = instruction_data.encode([ROW], tokenizer, 96)
    assert learned(example) == "gives 2<|im_end|>\n"
    whole = "<|im_start|>user\nadd 1 1<|im_end|>\n<|im_start|>assistant\ngives 2<|im_end|>\n"
    assert tokenizer.decode(example["input_ids"]) == whole

    tokenizer = make_tokenizer(template=None, bos=True)
    (example,) = instruction_data.encode([ROW], tokenizer, 96)
    assert tokenizer.decode(example["input_ids"]) == "<s>add 1 1gives 2</s>"
    assert learned(example) == "gives 2</s>"
    (example,) = instruction_data.encode([ROW], tokenizer, 10)
    assert len(example["labels"]) == len(example["input_ids"]) == 10
    assert learned(example) == "gi"


def test_without_trl_the_sft_script_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -c constraints.txt -e "\.\[examples\]"$'):
        runpy.run_path(str(SCRIPTS / "sft_trainer.py"))
