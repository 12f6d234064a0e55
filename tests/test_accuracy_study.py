"""The accuracy study: the data are read strictly and split by source, likelihoods are the model's, rows are kept."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from benchmarks.accuracy import harness_task, study, tables
from benchmarks.accuracy.harness_task import write_task
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.rows import LADDER, ROWS, append_row, held, next_rates, read_rows
from benchmarks.accuracy.scoring import Scores, answer_log_likelihoods, encode, score
from benchmarks.accuracy.tables import interval
from benchmarks.accuracy.tasks import TASKS, Question, load_task
from benchmarks.accuracy.training import Base, Run, execute, train
from moka_core import PRESETS, DataError, architecture, dequantise_nf4, quantise_nf4
from tests.moka_jax.train_toys import make_tokenizer
from tests.tiny import save_tiny_llama

LORA = METHODS["qlora-32"].rates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("accuracy") / "base", vocab_size=320)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of which the same question stands there twice or three times, with other choices."""
    folder = tmp_path_factory.mktemp("data")
    examples = [example(f"{n % 20} plus one. Is?", right=str(n % 20 + 1), wrong=[str(n), "x"]) for n in range(50)]
    for source in TASKS.values():
        write(folder / source.file, examples)
    return folder


def example(text: str, *, right: str, wrong: list[str]) -> dict[str, Any]:
    return {"input": text, "target_scores": {**dict.fromkeys((f"no {entry}" for entry in wrong), 0), right: 1}}


def write(path: Path, examples: Any) -> None:
    path.write_text(json.dumps({"examples": examples}))


# ---- tasks


def test_no_source_is_in_two_splits_and_every_question_in_one(data: Path) -> None:
    task = load_task("social_iqa", data, validation=10, test=12)
    sources = [{question.source for question in task.split(name)} for name in ("train", "validation", "test")]
    assert not sources[0] & sources[1]
    assert not (sources[0] | sources[1]) & sources[2]
    sizes = [len(task.split(name)) for name in ("train", "validation", "test")]
    assert sum(sizes) == 50
    assert 10 <= sizes[1] < 13
    assert 12 <= sizes[2] < 15
    assert load_task("social_iqa", data, validation=10, test=12) == task
    assert load_task("social_iqa", data, validation=10, test=12, seed=1) != task
    one = next(question for question in task.train if question.source == "3 plus one")
    assert one.prompt == "Question: 3 plus one. Is?\nAnswer:"
    assert one.choices[one.right] == " 4"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_scores": {"a": 0, "b": 0}}, r"examples\[1\]: expected one right answer; 'q' has 0"),
        ({"target_scores": {"a": 1, "b": 1}}, "expected one right answer; 'q' has 2"),
        ({"target_scores": {"a": 1, "b": 0.5}}, "expected one right answer"),
        ({"target_scores": {"a": 1, " ": 0}}, "expected choices that are not empty; one of 'q' is"),
        ({"target_scores": {"a": 1}}, "expected at least two choices; got 1 for 'q'"),
        ({"target_scores": {"a": 1, "a ": 0}}, "expected choices that differ; two of 'q' are equal"),
        ({"input": " "}, "expected an `input` and `target_scores`"),
        ({"target_scores": None}, "expected an `input` and `target_scores`"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sound = {"input": "q", "target_scores": {"a": 1, "b": 0}}
    write(tmp_path / TASKS["wikihow"].file, [sound, {**sound, **change}, sound])
    with pytest.raises(DataError, match=message) as caught:
        load_task("wikihow", tmp_path)
    assert "1 questions cannot be asked" in str(caught.value)


def test_a_choice_that_stands_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / TASKS["wikihow"].file).write_text(
        '{"examples": [{"input": "q", "target_scores": {"a": 0, "b": 0, "a": 1}}]}'
    )
    with pytest.raises(DataError, match="expected choices that differ; two of 'q' are equal"):
        load_task("wikihow", tmp_path)


def test_prompts() -> None:
    asked = TASKS["wikihow"].ask("The most reasonable step of 'Fake Food Poisoning' is")
    assert asked == "Question: What is the most reasonable step of 'Fake Food Poisoning'?\nAnswer:"


def test_files_that_are_none_are_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(DataError, match="no such file; --data is the folder"):
        load_task("wikihow", tmp_path)
    (tmp_path / TASKS["wikihow"].file).write_text("{")
    with pytest.raises(DataError, match="expected JSON with a list `examples`"):
        load_task("wikihow", tmp_path)
    write(tmp_path / TASKS["wikihow"].file, [])
    with pytest.raises(DataError, match="not empty"):
        load_task("wikihow", tmp_path)
    with pytest.raises(DataError, match="leave none for training"):
        load_task("wikihow", data, test=45)
    with pytest.raises(DataError, match="task: expected one of social_iqa"):
        load_task("boolq", data)


# ---- scores


def test_likelihoods_are_the_models_whatever_is_in_the_batch(folder: Path, data: Path) -> None:
    base = Base(folder, "cpu")
    questions = load_task("wikihow", data, validation=10, test=12).test[:5]
    scores = score(base.model, base.tokenizer, questions, longest=256, batch=4)
    lost = tokens = 0.0
    for question, found in zip(questions, scores.log_likelihoods, strict=True):
        for choice, value in zip(question.choices, found, strict=True):
            before = len(base.tokenizer(question.prompt).input_ids)
            whole = torch.tensor([base.tokenizer(question.prompt + choice).input_ids])
            with torch.no_grad():
                logs = base.model(whole).logits[0, :-1].double().log_softmax(-1)
            expected = logs.gather(1, whole[0, 1:, None])[before - 1 :].sum().item()
            assert value == pytest.approx(expected, rel=1e-5)
            if choice == question.choices[question.right]:
                lost, tokens = lost - expected, tokens + whole.shape[1] - before
    assert scores.loss == pytest.approx(lost / tokens, rel=1e-5)


def test_what_is_longer_than_the_context_is_named(folder: Path) -> None:
    base = Base(folder, "cpu")
    long = Question(prompt="Question: " + "a" * 300, choices=(" b", " c"), right=0, source="a")
    with pytest.raises(DataError, match=r"expected at most 256 tokens; got 312 for 'Question: aaa"):
        base.score([long])
    with pytest.raises(DataError, match="expected an answer that adds tokens"):
        encode(base.tokenizer, "a", "", longest=256)


def test_picks_and_accuracies() -> None:
    scores = Scores(
        log_likelihoods=[[-2.0, -3.0], [-5.0, -4.0, -9.0]], characters=[[1, 3], [2, 2, 9]], right=[0, 2], tokens=[2, 3]
    )
    assert (scores.lost, scores.loss) == ([2.0, 9.0], 11 / 5)
    assert (scores.picked(normalised=False), scores.accuracy(normalised=False)) == ([0, 1], 0.5)
    assert (scores.picked(normalised=True), scores.accuracy(normalised=True)) == ([1, 2], 0.5)


# ---- runs


def test_the_base_is_what_nf4_decodes_to(folder: Path) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base: Any = Base(folder, "cpu").model
    weight = plain.model.layers[1].mlp.up_proj.weight.detach().numpy()
    decoded = dequantise_nf4(quantise_nf4(weight, double=True))
    assert np.array_equal(base.model.layers[1].mlp.up_proj.weight.numpy(), decoded)
    assert not np.array_equal(weight, decoded)
    assert torch.equal(base.lm_head.weight, plain.lm_head.weight)
    half: Any = Base(folder, "cpu", "bfloat16").model
    assert torch.equal(half.model.layers[1].mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight.bfloat16())
    assert torch.equal(half.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base_and_learns(folder: Path, data: Path, method: str) -> None:
    base = Base(folder, "cpu")
    task = load_task("social_iqa", data, validation=10, test=12)
    few = dataclasses.replace(task, train=task.train[:8])
    answers = [encode(base.tokenizer, q.prompt, q.choices[q.right], longest=256) for q in few.train[:3]]
    with torch.no_grad():
        start = answer_log_likelihoods(base.with_adapter(method, 0).eval(), answers, pad=0)
        plain = answer_log_likelihoods(base.model, answers, pad=0)
    for one, other in zip(start, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    run = Run(task="social_iqa", method=method, rate=METHODS[method].rates[-1], seed=1, split="test", epochs=8, batch=4)
    losses = train(base.with_adapter(method, 1), base, few.train, run)
    assert len(losses) == 16
    assert sum(losses[-2:]) < sum(losses[:2])


def test_gates_learn_at_the_rate_of_their_own(folder: Path, data: Path) -> None:
    base, moved = Base(folder, "cpu"), {}
    questions = load_task("social_iqa", data, validation=10, test=12).train[:2]
    for method in ("moka-paper", "moka-gates"):
        model = base.with_adapter(method, 0)
        run = Run(task="social_iqa", method=method, rate=1e-3, seed=0, split="test", epochs=2, batch=2)
        train(model, base, questions, run)
        logits = torch.cat([entry for name, entry in model.named_parameters() if "gate_logits" in name])
        moved[method] = logits.abs().max().item()
    assert METHODS["moka-gates"].gate_rate == 10
    assert moved["moka-gates"] == pytest.approx(10 * moved["moka-paper"], rel=1e-3)  # AdamW's first move is the rate
    assert moved["moka-paper"] > 1e-5


def test_a_row_says_what_was_run_and_what_came_out(folder: Path, data: Path) -> None:
    task = load_task("social_iqa", data, validation=10, test=12)
    base, run = (
        Base(folder, "cpu"),
        Run(task="social_iqa", method="qlora-32", rate=1e-3, seed=1, split="test", epochs=1),
    )
    row = execute(run, base, task)
    assert {key: row[key] for key in dataclasses.asdict(run)} == dataclasses.asdict(run)
    assert row["steps"] == -(-len(task.train) // 16)
    assert row["questions"] == len(row["accuracy_norm_each"]) == len(task.test)
    assert row["accuracy_norm"] == row["accuracy_norm_each"].count("1") / len(task.test)
    tokens = sum(len(base.tokenizer(question.choices[question.right]).input_ids) for question in task.test)
    assert row["loss"] == pytest.approx(sum(row["lost_each"]) / tokens, abs=1e-3)
    again = execute(run, base, task)
    assert {**again, "train_seconds": 0} == {**row, "train_seconds": 0}, "a seed decides a run"


def test_what_was_run_is_not_run_again_and_the_test_is_of_the_best_rate(
    tmp_path: Path, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    done: list[Run] = []
    losses = dict(zip(LORA, (2.0, 1.0, 2.5), strict=True))

    def pretend(run: Run, base: Base, task: Any) -> dict[str, Any]:
        done.append(run)
        each = "10" * (len(task.split(run.split)) // 2)
        figures = {"loss": losses[run.rate], "questions": len(each), "parameters": 7, "train_seconds": 1.0}
        figures["lost_each"] = [1.0] * len(each)
        named = {
            f"{name}{part}": value
            for name in ("accuracy", "accuracy_norm")
            for part, value in (("", 0.5), ("_each", each))
        }
        return {**dataclasses.asdict(run), **figures, **named}

    monkeypatch.setattr(study, "execute", pretend)
    monkeypatch.setattr(study, "load_task", lambda name, path: load_task(name, path, validation=10, test=12))
    rows = tmp_path / "rows.jsonl"
    options = ["--base", str(folder), "--data", str(data), "--rows", str(rows), "--tasks", "wikihow", "--device", "cpu"]
    study.main([*options, "--methods", "qlora-32", "--seeds", "2", "--minutes", "0"])
    assert not done
    assert not rows.exists()
    study.main([*options, "--methods", "qlora-32", "--seeds", "2"])
    assert [(row["method"], row["split"]) for row in read_rows(rows)[:2]] == [
        ("base", "validation"),
        ("base", "test"),
    ]
    assert [(run.rate, run.seed, run.split) for run in done] == [
        *((rate, 0, "validation") for rate in LORA),
        *((1e-3, seed, "test") for seed in (1, 2)),
    ]
    study.main([*options, "--methods", "qlora-32", "--seeds", "3"])
    assert [(run.rate, run.seed) for run in done[5:]] == [(1e-3, 3)]
    text = tables.markdown(read_rows(rows))
    assert "| qlora-32 | LoRA r=32 on q, k, v, up, down | 7 | 0.001 | 3 | 50.0 (" in text
    tables.draw(read_rows(rows), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        study.main([*options, "--methods", "lora"])
    with pytest.raises(SystemExit):
        study.main([*options, "--methods", "qlora-32", "--dtype", "float32"])
    assert f"{rows}: expected rows of the same dtype" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([*options, "--methods", "qlora-32", "--epochs", "2"])
    assert f"{rows}: expected rows of the same epochs" in capsys.readouterr().err
    with held(rows), pytest.raises(SystemExit):
        study.main([*options, "--methods", "qlora-32"])
    assert "another study adds rows to it" in capsys.readouterr().err


def test_a_failed_run_is_told_and_the_others_go_on(
    tmp_path: Path, folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(run: Run, base: Base, task: Any) -> dict[str, Any]:
        if run.rate == LORA[1]:
            raise RuntimeError("out of memory")
        return {**dataclasses.asdict(run), "loss": 1.0}

    monkeypatch.setattr(study, "execute", fail)
    monkeypatch.setattr(study, "load_task", lambda name, path: load_task(name, path, validation=10, test=12))
    rows = tmp_path / "rows.jsonl"
    options = ["--base", str(folder), "--data", str(data), "--rows", str(rows), "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        study.main([*options, "--tasks", "wikihow", "--methods", "qlora-32"])
    assert stop.value.code == 1
    assert [row["rate"] for row in read_rows(rows)] == [0.0, 0.0, LORA[0], LORA[2]]
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    for wrong in (["--base", "nowhere"], ["--data", "nowhere"], ["--workers", "0"]):
        with pytest.raises(SystemExit) as stop:
            study.main([*options, *wrong])
        assert stop.value.code == 2


# ---- rows


def test_rates_are_tried_until_the_best_stands_between_worse_ones() -> None:
    def rows(**losses: float) -> list[dict[str, Any]]:
        common = {"task": "t", "method": "qlora-32", "split": "validation", "seed": 0}
        return [{**common, "rate": float(rate), "loss": loss} for rate, loss in losses.items()]

    assert next_rates([], "t", "qlora-32") == ([3e-4, 1e-3, 3e-3], None)
    inside = {"3e-4": 2.0, "1e-3": 1.0, "3e-3": 2.0}
    assert next_rates(rows(**inside), "t", "qlora-32") == ([], 1e-3)
    assert next_rates(rows(**inside), "t", "moka-paper")[1] is None
    rising = inside | {"3e-3": 0.5}
    (found,), chosen = next_rates(rows(**rising), "t", "qlora-32")
    assert (found, chosen) == (pytest.approx(1e-2), None)
    assert found in LADDER
    assert next_rates(rows(**rising | {repr(found): 0.4}), "t", "qlora-32")[0] == [pytest.approx(3e-2)]
    assert next_rates(rows(**rising | {repr(found): float("nan")}), "t", "qlora-32") == ([], 3e-3)
    assert next_rates(rows(**rising | {repr(found): 0.4, "3e-2": 0.3}), "t", "qlora-32") == ([], 3e-2), "five tries"
    (found,), _ = next_rates(rows(**inside | {"3e-4": 0.5}), "t", "qlora-32")
    assert found == pytest.approx(1e-4)


def test_a_variant_is_tried_and_not_tested() -> None:
    def left(method: str) -> list[Run]:
        rows = [
            {"task": "wikihow", "method": method, "split": "validation", "seed": 0, "rate": rate, "loss": loss}
            | {"epochs": 1, "batch": 16, "dtype": "float32"}
            for rate, loss in zip(METHODS[method].rates, (2.0, 1.0, 3.0), strict=True)
        ]
        options = argparse.Namespace(tasks=["wikihow"], methods=[method], seeds=2, epochs=1, dtype="float32")
        return [run for run in study.missing(rows, options) if run.method == method]

    assert not left("moka-wide-3")
    assert [(run.split, run.seed) for run in left("moka-recommended")] == [("test", 1), ("test", 2)]


@pytest.mark.parametrize(("name", "method"), [("paper", "moka-paper"), ("recommended", "moka-recommended")])
def test_the_learning_rate_of_a_preset_is_the_best_of_the_study(name: str, method: str) -> None:
    """The least mean over both tasks of the loss on validation, of the rates that were tried on both."""
    tried: dict[float, dict[str, float]] = {}
    for row in read_rows(ROWS):
        if (row["method"], row["split"]) == (method, "validation"):
            tried.setdefault(row["rate"], {})[row["task"]] = row["loss"]
    both = {rate: sum(losses.values()) for rate, losses in tried.items() if losses.keys() == {"social_iqa", "wikihow"}}
    assert len(both) >= 3
    assert PRESETS[name].learning_rate == min(both, key=lambda rate: both[rate])


@pytest.mark.parametrize("method", ["moka-paper", "moka-uniform", "moka-recommended"])
def test_the_rows_of_a_preset_are_of_what_the_preset_is_now(method: str) -> None:
    rows = [row for row in read_rows(ROWS) if row["method"] == method]
    assert len(rows) >= 10
    if {row["versions"]["peft"] for row in rows} != {peft.__version__}:
        pytest.skip("another version of PEFT writes other fields into a config")
    now = study.method_digest(method, architecture("smollm2-135m"))
    assert {row["made"]["method"] for row in rows} == {now}


def test_a_row_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"task": "t", "method": "m", "split": "test", "rate": 1.0, "seed": 1}
    append_row(path, row)
    with path.open("a") as file:
        file.write('{"task": "t", "met')
    assert read_rows(path) == [row]
    append_row(path, row | {"seed": 2})
    assert read_rows(path) == [row, row | {"seed": 2}]
    append_row(path, row)
    with pytest.raises(DataError, match=r"expected a row a run; .*'seed': 1} has several"):
        read_rows(path)
    path.write_text("{\n{}\n")
    with pytest.raises(DataError, match="line 1: expected a row in JSON"):
        read_rows(path)


@pytest.mark.slow  # two processes that import PyTorch
def test_workers_give_the_rows_of_one(tmp_path: Path, folder: Path) -> None:
    examples = [example(f"{n} plus one. Is?", right=str(n + 1), wrong=[str(n), "x"]) for n in range(800)]
    write(tmp_path / TASKS["wikihow"].file, examples)
    found = []
    for workers in (1, 2):
        rows = tmp_path / f"{workers}.jsonl"
        options = ["--base", str(folder), "--data", str(tmp_path), "--rows", str(rows), "--workers", str(workers)]
        study.main([*options, "--tasks", "wikihow", "--methods", "moka-paper", "--seeds", "1", "--device", "cpu"])
        found.append({(row["method"], row["rate"], row["split"]): row for row in read_rows(rows)})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 2 + 5 + 1, "the largest rate stays the best, so there are five tries"
    for key, row in found[0].items():
        assert row["loss"] == pytest.approx(found[1][key]["loss"], abs=2e-3)  # bfloat16; measured: 0


# ---- intervals


@pytest.mark.parametrize("spread", [0.0, 0.04])
def test_an_interval_holds_what_is_true_nearly_as_often_as_it_says(spread: float) -> None:
    """Of seeds that differ by `spread`, and questions that nearly all seeds answer alike."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        easy = rng.random(200) < 0.4
        flipped = rng.random((3, 200)) < np.clip(0.05 + rng.normal(0, spread, (3, 1)), 0, 1)
        _, low, high = interval((easy ^ flipped).astype(int), draws=400)
        held += low <= 0.4 * 0.95 + 0.6 * 0.05 <= high
    assert held >= 53  # measured, with 10,000 draws: 59 of 60 for either


def test_questions_of_one_source_count_as_one() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(50) < 0.5, 10)[None].astype(int)
    alone, together = interval(right), interval(right, sources=list(np.repeat(range(50), 10)))
    assert together[0] == alone[0]
    assert together[2] - together[1] == pytest.approx(np.sqrt(10) * (alone[2] - alone[1]), rel=0.1)


def test_a_difference_does_not_count_what_is_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    one = np.stack([hard ^ (rng.random(400) < 0.02) for _ in range(3)]).astype(int)
    other = np.stack([hard ^ (rng.random(400) < 0.02) for _ in range(3)]).astype(int)
    mean, low, high = interval(one - other)
    assert low < 0 < high
    assert high - low < 0.05  # measured: 0.040, with the seeds' spread widened; alone 0.095
    alone = interval(one)
    assert alone[2] - alone[1] > 2 * (high - low)
    assert mean == pytest.approx(one.mean() - other.mean())


def test_a_difference_does_not_count_what_a_seed_does_to_both() -> None:
    def row(seed: int, extra: float) -> dict[str, Any]:
        loss = 1.0 + 0.1 * seed + extra
        return {"seed": seed, "loss": loss, "lost_each": [loss] * 50, "accuracy_norm_each": "1" * 50}

    one = [row(seed, 0.0) for seed in (1, 2, 3, 4)]
    other = [row(seed, 0.01) for seed in (1, 2, 3)]  # the fourth seed is left out of the difference
    _, loss = tables.differences(other, one, None)
    assert loss == pytest.approx((0.01, 0.01, 0.01))
    _, low, high = interval(tables.lost(one))
    assert high - low > 0.1


def test_the_loss_is_the_mean_of_what_each_question_adds() -> None:
    rows = [{"loss": 2.0, "lost_each": [1.0, 3.0, 8.0]}, {"loss": 4.0, "lost_each": [6.0, 6.0, 6.0]}]
    found = tables.lost(rows)
    assert found.mean(axis=1) == pytest.approx([2, 4])
    assert found[0] == pytest.approx([0.5, 1.5, 4.0])


# ---- for lm-eval


def test_lm_eval_scores_the_study_as_the_study_does(folder: Path, data: Path, tmp_path: Path) -> None:
    examples = []
    for number in range(60):  # choices of many lengths, so that the two accuracies differ
        wrong = ["é" * (1 + number % 7), "a rather long answer to the question" * (1 + number % 2)]
        examples.append(example(f"{number} plus one. Is?", right=str(number + 1), wrong=wrong))
    write(tmp_path / TASKS["wikihow"].file, examples)
    task = load_task("wikihow", tmp_path, validation=5, test=50)
    base = Base(folder, "cpu")
    scores = base.score(task.test)
    file = write_task(tmp_path / "out", "study", task.test)
    lm = HFLM(pretrained=base.model, backend="causal", tokenizer=base.tokenizer, batch_size=8)
    results: Any = evaluate(lm, TaskManager(include_defaults=False).load([str(file)]))
    for metric, normalised in (("acc", False), ("acc_norm", True)):
        assert results["results"]["study"][f"{metric},none"] == scores.accuracy(normalised=normalised)
    assert scores.picked(normalised=False) != scores.picked(normalised=True)
    for sample, question, found in zip(results["samples"]["study"], task.test, scores.log_likelihoods, strict=True):
        assert [tuple(entry) for entry in sample["arguments"]] == [
            (question.prompt, choice) for choice in question.choices
        ]
        assert [answer[0][0] for answer in sample["resps"]] == pytest.approx(found, abs=1e-4)
        answer = encode(base.tokenizer, question.prompt, question.choices[0], longest=256)
        context, continuation = lm._encode_pair(question.prompt, question.choices[0])
        assert (context + continuation, len(context)) == (list(answer.tokens), answer.start)


def test_the_task_of_the_study_is_written(data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(harness_task, "load_task", lambda name, data: load_task(name, data, validation=10, test=12))
    harness_task.main(["--data", str(data), "--task", "social_iqa", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "social_iqa.yaml")
    rows = [json.loads(line) for line in (tmp_path / "social_iqa.jsonl").read_text().splitlines()]
    assert len(rows) == len(load_task("social_iqa", data, validation=10, test=12).test)
    odd = Question(prompt="q", choices=("no space", " b"), right=0, source="q")
    with pytest.raises(DataError, match="expected choices that begin with one space; got 'no space'"):
        write_task(tmp_path, "odd", [odd])
