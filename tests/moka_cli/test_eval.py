"""`moka eval`: both backends give lm-eval's own numbers, and the command refuses what gives none."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.numpy import load_file, save_file

import moka_cli.eval_tasks
from conversion import open_base, save_adapter
from moka_cli.eval import SETS, chosen, evaluate, flax_lm
from moka_cli.eval_checks import check_tasks
from moka_cli.eval_tasks import Reader, load_tasks
from moka_cli.main import main
from moka_core import ConfigError, ModelError, MokaConfig
from tests.moka_cli.eval_toys import FEW, WORDS, questions, task
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import random_adapter, save_tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("eval") / "base", vocab_size=320)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MokaConfig(r=2, num_shapes=1, target_modules=("q_proj", "v_proj"))
    value = random_adapter(open_base(base), config)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(value, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """100 choices, five prompts to go on with, four whole texts of which one exceeds the context."""
    folder = tmp_path_factory.mktemp("tasks")
    prompts = [{"q": text, "label": "x"} for text in ("one two", "red", "the sea is", "seven", "green or blue")]
    texts = [{"text": " ".join(WORDS[: n + 2])} for n in range(3)] + [{"text": " ".join(WORDS * 8)}]
    going_on = {"until": ["A", "k"], "max_gen_toks": 24}
    plain = {"doc_to_choice": None, "num_fewshot": 0}
    return [
        task(folder, "pick", questions(100), fewshot_split="test"),
        task(folder, "go_on", prompts, output_type="generate_until", generation_kwargs=going_on, **plain),
        task(folder, "roll", texts, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", **plain),
    ]


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def samples(file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        found.setdefault(json.loads(line)["task"], []).append(json.loads(line))
    return found


def values(samples: list[dict[str, Any]]) -> np.ndarray:
    """The log-likelihoods of every choice of every question."""
    return np.array([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])


def test_both_backends_agree_on_an_adapter(base, adapter, tasks, tmp_path, capsys):
    logged, figures = {}, {}
    for backend in ("torch", "jax"):
        files = tmp_path / f"{backend}.jsonl", tmp_path / f"{backend}.json"
        names = ",".join(map(str, tasks))
        status = call(
            *("eval", adapter, "--base", base, "--tasks", names, "--backend", backend, "--shots", 1),
            *("--samples", files[0], "--json", files[1]),
        )
        assert status == 0
        logged[backend], figures[backend] = samples(files[0]), json.loads(files[1].read_text())
    printed, told = (" ".join(text.split()) for text in capsys.readouterr())
    assert re.search(r"\b\d+ of 3\d\d answers|loading the model", told)
    assert told.index("note: ") < told.index("loading the model")
    assert "--shots 1 is not for go_on, roll: num_fewshot is fixed there" in told
    assert f"next: the base alone: moka eval --base {base} --tasks {names} --shots 1 --quantise nf4-double" in printed
    torch, jax = logged["torch"], logged["jax"]
    assert [sample["arguments"] for sample in torch["pick"]] == [sample["arguments"] for sample in jax["pick"]]
    one, other = values(torch["pick"]), values(jax["pick"])
    assert one.std(axis=1).min() > 0.01  # choices differ by far more than the backends
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)  # measured 3e-5
    assert np.mean(one.argmax(1) == other.argmax(1)) >= 0.99
    for sample, twin in zip(torch["pick"], jax["pick"], strict=True):
        assert [answer[0][1] for answer in sample["resps"]] == [answer[0][1] for answer in twin["resps"]]
    texts = [[sample["resps"][0][0] for sample in side["go_on"]] for side in (torch, jax)]
    assert texts[0] == texts[1]
    assert len({len(text) for text in texts[0]}) > 1  # some met a stop text
    assert not any(stop in text for text in texts[0] for stop in "Ak")
    rolled = [[float(sample["resps"][0][0]) for sample in side["roll"]] for side in (torch, jax)]
    np.testing.assert_allclose(rolled[0], rolled[1], rtol=1e-5)
    report = figures["torch"]["tasks"]["pick"]
    assert (report["questions"], report["shots"]) == (100, 1)
    assert report["metrics"] == figures["jax"]["tasks"]["pick"]["metrics"]
    assert figures["torch"]["quantise"] == "nf4-double"


def test_the_base_alone_has_the_harness_own_numbers(base, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # starts pip
    own: Any = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "dtype": "float32"},
        tasks=[str(tasks[0])],
        num_fewshot=2,
        device="cpu",
        batch_size=8,
        task_manager=moka_cli.eval_tasks.TaskManager(include_defaults=False),
    )
    for backend in ("torch", "jax"):
        files = tmp_path / f"{backend}.jsonl", tmp_path / f"{backend}.json"
        status = call(
            *("eval", "--base", base, "--tasks", tasks[0], "--backend", backend, "--shots", 2, "--quantise", "none"),
            *("--samples", files[0], "--json", files[1]),
        )
        assert status == 0
        found = json.loads(files[1].read_text())["tasks"]["pick"]["metrics"]
        for metric in ("acc", "acc_norm"):
            assert found[metric]["value"] == own["results"]["pick"][f"{metric},none"]
            assert found[metric]["stderr"] == pytest.approx(own["results"]["pick"][f"{metric}_stderr,none"])
        logged = samples(files[0])["pick"]
        assert [tuple(map(tuple, one["arguments"])) for one in logged] == [
            tuple(map(tuple, one["arguments"])) for one in own["samples"]["pick"]
        ]
        np.testing.assert_allclose(values(logged), values(own["samples"]["pick"]), rtol=0, atol=1e-4)


def test_the_folders_stop_tokens_end_a_text_too(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 3]}))
    lm = flax_lm(folder, None, make_tokenizer(), quantise="none", allow_other_base=False, batch_size=2)
    assert (lm.stop_tokens, lm.batch_size) == ({2, 3, 4}, 2)


def test_texts_become_tokens_as_in_hflm(base):
    harness = HFLM(pretrained=str(base), device="cpu")
    for bos in (False, True):
        for eos in (False, True):
            tokenizer = make_tokenizer(bos=bos, eos=eos)
            harness.tokenizer, reader = tokenizer, Reader(tokenizer)
            for text in ("one", "<s>one", " two\n", "</s>", "A: é"):
                for special in (None, True, False):
                    assert reader.tok_encode(text, special) == harness.tok_encode(text, special)
                assert reader.prompt_tokens(text) == harness.tok_batch_encode([text])[0][0].tolist()
            messages = [{"role": "user", "content": "one"}]
            assert reader.apply_chat_template(messages) == harness.apply_chat_template(messages)
            assert reader.prefix_token_id == harness.prefix_token_id
    assert reader.prompt_tokens("<s>one") != [1, *reader.prompt_tokens("one")]


@pytest.mark.slow
def test_the_sets_are_tasks_of_lm_eval():
    known = moka_cli.eval_tasks.TaskManager().all_tasks  # reads 14,000 files
    assert not {name for names, _ in SETS.values() for name in names} - set(known)


def test_sets_and_names():
    assert chosen(None, "mmlu", None) == (["mmlu"], 5)
    assert chosen(None, "mmlu", 0) == (["mmlu"], 0)
    names, shots = chosen(None, "commonsense", None)
    assert (len(names), shots) == (8, None)
    assert chosen("a, b.yaml", None, 2) == (["a", "b.yaml"], 2)
    for tasks, set_ in ((None, None), ("a", "mmlu"), (None, "glue"), ("a,,b", None)):
        with pytest.raises(ConfigError, match="expected"):
            chosen(tasks, set_, None)


# ---- what the command refuses


def test_refusals_of_the_command(base, adapter, tasks, tmp_path, capsys, monkeypatch):
    pick = tasks[0]
    other = save_tiny_llama(tmp_path / "other", vocab_size=320, seed=1)
    make_tokenizer(template=None).save_pretrained(other)
    for arguments, message in (
        ((adapter, "--base", other, "--tasks", pick), "--allow-other-base"),
        (("--base", base, "--tasks", pick, "--limit", 0), "--limit: expected at least 1; got 0"),
        (("--base", base, "--tasks", pick, "--batch-size", 0), "--batch-size: expected at least 1"),
        (("--base", base), "expected either --tasks NAME,FILE.yaml or --set commonsense|mmlu; got neither"),
        (("--base", base, "--tasks", pick, "--json", "same", "--samples", "same"), "expected another file than --json"),
        (("--base", base, "--tasks", "mmlu"), "--tasks: mmlu is a set of tasks; use --set mmlu"),
        (("--base", base, "--tasks", f"{pick},{pick}"), "expected each task once"),
        (("--base", base, "--tasks", "task.jsonl"), "task.jsonl holds data; expected a task of lm-eval in YAML"),
        (("--base", base, "--tasks", pick, "--samples", tmp_path / "no" / "x"), "expected an existing folder"),
        (("--base", other, "--tasks", pick, "--chat"), "--chat: expected a tokenizer with a chat template"),
    ):
        assert call("eval", *arguments) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert call("eval", "--base", base, "--tasks", pick) == 1
    assert 'pip install "moka[eval]"' in capsys.readouterr().err


def test_figures_that_are_not_finite_are_refused(base, tasks):
    loaded = load_tasks([str(tasks[0])])
    reader = Reader(make_tokenizer())
    check_tasks(loaded, reader, FEW, limit=2)
    monkey: Any = reader
    monkey.loglikelihood = lambda requests, **_: [(float("nan"), False)] * len(requests)
    with pytest.raises(ModelError, match="pick: document 0: a log-likelihood is not finite"):
        evaluate(reader, loaded, limit=2, chat=False, tell=print)


def test_a_base_that_is_not_finite_is_refused_in_both_backends(base, tasks, tmp_path, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for backend, message in (("torch", "logits are not finite"), ("jax", "expected finite numbers")):
        assert call("eval", "--base", folder, "--tasks", tasks[1], "--backend", backend) == 1
        assert message in " ".join(capsys.readouterr().err.split())
