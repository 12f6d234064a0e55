"""`moka generate`: it reads prompts as training taught them, prints what comes, and refuses before weights are read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import moka_cli.generate
from conversion import open_base, save_adapter
from moka_cli.generate import TextPieces, prompt_tokens, read_prompts
from moka_core import MokaConfig
from moka_jax.train import load_dataset
from tests.moka_cli.test_commands import call
from tests.moka_jax.train_toys import TEMPLATE, make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("generate") / "base", vocab_size=320, max_position_embeddings=128)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_an_adapter_of_another_model_is_refused(base, tmp_path, capsys):
    other = save_tiny_llama(tmp_path / "other", seed=3, vocab_size=320)
    make_tokenizer().save_pretrained(other)
    config = MokaConfig(r=2, num_shapes=1, target_modules=("q_proj",))
    save_adapter(random_adapter(open_base(other), config), tmp_path / "adapter")
    assert call("generate", "--base", base, "--adapter", tmp_path / "adapter", "--prompt", "hello") == 1
    captured = capsys.readouterr()
    assert "the adapter was trained on another base model" in captured.err
    assert "--allow-other-base" in captured.err
    assert "Traceback" not in captured.err
    arguments = ["--adapter", tmp_path / "adapter", "--prompt", "hello", "--max-new-tokens", 2]
    assert call("generate", "--base", base, *arguments, "--allow-other-base") == 0


def test_an_adapter_of_another_base_is_refused_before_the_weights_are_read(base, tmp_path, capsys, monkeypatch):
    tuned = save_tiny_llama(tmp_path / "tuned", vocab_size=320, max_position_embeddings=128)
    tensors = load_file(tuned / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = tensors[name] + 0.01 * rng.normal(size=tensors[name].shape).astype(np.float32)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    config = MokaConfig(r=2, num_shapes=1, target_modules=("q_proj",))
    save_adapter(random_adapter(open_base(tuned), config), tmp_path / "adapter")
    monkeypatch.setattr(moka_cli.generate, "load_model", None)
    assert call("generate", "--base", base, "--adapter", tmp_path / "adapter", "--prompt", "hello") == 1
    assert "other linear weights: q_proj in " in capsys.readouterr().err


def test_a_model_folder_that_is_no_llama_is_refused_by_name(tmp_path, base, capsys):
    folder = tmp_path / "bert"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    assert call("generate", "--base", folder, "--prompt", "x") == 1
    assert "model_type 'bert' is not supported; supported: llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: expected JSON; E"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: expected JSON; "),
        ("tokenizer.json", "[]", "tokenizer.json: expected a JSON object; got list"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: expected a JSON object; got list"),
        ("tokenizer.json", "{}", "expected a tokenizer that transformers can load; got "),
        ("chat_template.jinja", b"\xff", "expected a tokenizer that transformers can load; got UnicodeDecodeError"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused(base, tmp_path, capsys, name, text, message):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert call("generate", "--base", folder, "--prompt", "x") == 1
    told = capsys.readouterr().err
    assert told.startswith(f"moka: error: {folder}")
    assert message in told
    assert "foresaw" not in told


@pytest.mark.parametrize("template", ["\n\n" + TEMPLATE, "{{ strftime_now('%d %b %Y') }}" + TEMPLATE])
def test_generation_reads_the_prompt_that_training_taught(tmp_path, template):
    """Also where a template begins with white space, or writes today's date."""
    tokenizer = make_tokenizer(template)
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "what?", "completion": "that."}) + "\n")
    example = load_dataset(path, tokenizer, max_length=128).examples[0]
    taught = example.tokens[: int(np.argmax(example.loss_mask))].tolist()
    assert prompt_tokens(tokenizer, "what?") == taught
    assert tokenizer.decode(taught).startswith(("\n\n", "26 Jul 2024"))


@pytest.mark.parametrize("added", [{}, {"bos": True}, {"eos": True}, {"bos": True, "eos": True}], ids=str)
def test_generation_reads_the_plain_prompt_that_training_taught(tmp_path, added):
    """Also where the tokenizer would add an end token: after one there is nothing to complete."""
    tokenizer = make_tokenizer(None, **added)
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "what?", "completion": " that."}) + "\n")
    example = load_dataset(path, tokenizer).examples[0]
    taught = example.tokens[: int(np.argmax(example.loss_mask))].tolist()
    assert prompt_tokens(tokenizer, "what?") == prompt_tokens(tokenizer, "what?", raw=True) == taught
    assert tokenizer.decode(taught) == "<s>" * added.get("bos", False) + "what?"


def test_a_prompt_beyond_the_context_is_refused_before_the_weights_are_read(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(moka_cli.generate, "load_model", None)
    assert call("generate", "--base", base, "--prompt", "word " * 60) == 1
    assert "exceed the model's context of 128" in capsys.readouterr().err
    assert call("generate", "--base", base, "--prompt", "short", "--prompt", "word " * 60) == 1
    assert "generate: prompt 2 of 2: " in capsys.readouterr().err


def test_generate_takes_several_prompts_and_prints_json(base, tmp_path, capsys):
    """What is drawn for a prompt does not depend on the batches."""
    lines = ["count to three", json.dumps({"prompt": "über 日本 🙂", "completion": "not read"}), "", '"a"']
    (tmp_path / "more.jsonl").write_text("\n".join([json.dumps(lines[0]), *lines[1:]]) + "\n", encoding="utf-8")
    shared = ["generate", "--base", base, "--max-new-tokens", 12, "--quantise", "none"]
    several = [*shared, "--prompt", "add 1 1", "--prompts", tmp_path / "more.jsonl", "--json", "-"]

    def completions(*arguments):
        assert call(*arguments) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    found = completions(*several)
    assert [record["prompt"] for record in found] == ["add 1 1", "count to three", "über 日本 🙂", "a"]
    for record in found:
        assert set(record) == {"prompt", "completion", "tokens", "ended"}
        assert record["ended"] == ("length" if len(record["tokens"]) == 12 else "stop")

    warm = ["--temperature", 1.2, "--top-k", 50, "--top-p", 0.95, "--seed", 4]
    drawn = completions(*several, *warm)
    assert drawn != found
    assert completions(*several, *warm, "--batch-size", 1) == drawn

    assert call(*several[:-2]) == 0
    expected = [f"--- {i + 1} of 4: {record['prompt']}\n{record['completion']}\n" for i, record in enumerate(found)]
    assert capsys.readouterr().out == "".join(expected)

    assert call(*several[:-1], tmp_path / "lines.jsonl") == 0
    assert capsys.readouterr().out == "".join(expected)
    written = (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == found


def test_one_prompt_is_printed_as_it_comes_and_is_the_same_text(base, capsys, monkeypatch):
    arguments = ["generate", "--base", base, "--max-new-tokens", 30, "--prompt", "add 2 2", "--quantise", "none"]
    arguments += ["--temperature", 1.0, "--seed", 3]
    assert call(*arguments, "--json", "-") == 0
    record = json.loads(capsys.readouterr().out)
    pieces = []
    monkeypatch.setattr("builtins.print", lambda text, **options: pieces.append(text))
    assert call(*arguments) == 0
    assert len(pieces) == len(record["tokens"]) + 1
    assert sum(map(bool, pieces)) > 5
    assert "".join(pieces) == record["completion"]


def test_the_models_own_stop_tokens_end_a_completion_too(base, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    arguments = ["generate", "--base", folder, "--prompt", "go", "--max-new-tokens", 12, "--quantise", "none"]
    arguments += ["--json", "-"]
    assert call(*arguments) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, tokens[3]]}))
    assert call(*arguments) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["tokens"] == tokens[: tokens.index(tokens[3])]
    assert stopped["ended"] == "stop"


@pytest.mark.parametrize(
    "text", ["plain words, and lines\nand more", "naïve 日本語 🙂👩‍👩‍👧 Ωmega", " leading", "\ufffd is a character"]
)
@pytest.mark.parametrize("merges", [(), ((" ", "a"), ("n", "d"), ("Ã", "¯"))], ids=["bytes", "merges"])
def test_text_that_comes_token_by_token_is_the_same_text_in_whole_characters(text, merges):
    tokenizer = make_tokenizer(merges=tuple((a.replace(" ", "Ġ"), b) for a, b in merges))
    tokens = tokenizer(text)["input_ids"]
    tokens = [*tokens[:3], tokenizer.eos_token_id, *tokens[3:]]  # special tokens are not part of the text
    stream = TextPieces(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.rest() == tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert sum(map(bool, pieces)) >= len(text) // 2
    broken = TextPieces(tokenizer)
    half = tokenizer("a🙂")["input_ids"][:-1]
    assert [broken.add(token) for token in half] == ["a", *[""] * (len(half) - 1)]
    assert "a" + broken.rest() == tokenizer.decode(half)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": 3}\n"ok"\n{',
            'line 1: expected a JSON string, or an object with a string "prompt"; got',
        ),
        ("p.jsonl", '"ok"\n{', "line 2: expected JSON; "),
        ("p.jsonl", '"ok"\n' + "[" * 100_000, "line 2: expected JSON; maximum recursion depth exceeded"),
        ("p.jsonl", '"ok"\n' + "1" * 5000, "line 2: expected JSON; Exceeds the limit"),
        ("p.jsonl", '"ok"\n"a \\ud800 b"', "line 2: holds half of a surrogate pair, which is no character"),
        ("p.txt", "\n  \n", "expected at least one prompt; the file is empty"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_refused(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert call("generate", "--base", "nowhere", "--prompts", tmp_path / name) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ raise_exception('not so') }}"])
def test_a_chat_template_that_fails_is_told_in_generation_too(base, tmp_path, capsys, template):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text(template)
    assert call("generate", "--base", folder, "--prompt", "x") == 1
    told = capsys.readouterr().err
    assert told.startswith("moka: error: the tokenizer's chat template ")
    assert "foresaw" not in told


def test_a_plain_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("one\r\n\n  two\u2028 \n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["one", "  two\u2028 "]
