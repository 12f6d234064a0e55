"""`moka eval`: what cannot be asked or scored is named before a model is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import moka_cli.eval_tasks
from moka_cli.eval_checks import Limits, check_tasks
from moka_cli.eval_tasks import Reader, load_tasks
from moka_core import ConfigError, DataError, MokaError
from tests.moka_cli.eval_toys import FEW, questions, task
from tests.moka_jax.train_toys import make_tokenizer


def check(file: Path, *, limits: Limits = FEW, **settings: Any) -> list[str]:
    shots, limit = settings.pop("shots", None), settings.pop("limit", None)
    loaded = load_tasks([str(file)], shots=shots, limit=limit)
    return check_tasks(loaded, Reader(make_tokenizer()), limits, limit=limit, **settings)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, r"right answer, its number from 0 to 2 or one of the choices; got 3"),
        ({"label": -1}, "got -1"),
        ({"label": None}, "expected a right answer; it has none"),
        ({"choices": ["a", " ", "c"]}, r"expected choices that are not empty; number 1 of \['a', ' ', 'c'\] is"),
        ({"choices": ["a", "", "c"]}, "expected choices that are not empty"),
        ({"choices": []}, r"expected a list of choices, each a text; got \[\]"),
        ({"q": "long " * 60}, r"1 of its .*\n.*299 tokens of the question and \d of answer 0 exceed .* context of 256"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(tmp_path, change, message, first):
    rows = questions(4)
    at = 0 if first else 2  # lm-eval itself looks at the first as it loads
    rows[at] |= change
    with pytest.raises(DataError, match=message) as caught:
        check(task(tmp_path, "bad", rows))
    assert f"document {at}: " in str(caught.value)
    assert str(caught.value).startswith("bad: ")
    if not first:
        check(task(tmp_path, "good", rows), limit=2)


def test_answers_by_their_text_and_labels_that_are_not_there(tmp_path):
    rows = [{**row, "label": row["choices"][row["label"]]} for row in questions(3)]
    assert check(task(tmp_path, "texts", rows)) == []
    rows[1]["label"] = "none of them"
    with pytest.raises(DataError, match=r"document 1: expected a right answer.*got 'none of them'"):
        check(task(tmp_path, "texts", rows))
    with pytest.raises(DataError, match=r"3 of its questions.*documents count from 0.*\n  document 0: .*got 'lable'"):
        check(task(tmp_path, "typo", questions(3), doc_to_target="lable"))
    with pytest.raises(DataError, match=r"(?s)wrong: .*'nothing' is undefined"):
        check(task(tmp_path, "wrong", questions(3), doc_to_text="{{nothing}}"))


def test_a_field_that_names_no_column_and_a_metric_that_is_none(tmp_path):
    for key in ("doc_to_text", "doc_to_choice"):
        with pytest.raises(DataError, match=rf"{key}: expected a column of the data \(q, choices, label\).*got 'qq'"):
            check(task(tmp_path, "typo", questions(3), **{key: "qq"}))
    with pytest.raises(ConfigError, match=r"metric_list: lm-eval has no metric 'accc'; did you mean 'acc'\?"):
        check(task(tmp_path, "metric", questions(3), metric_list=[{"metric": "accc"}]))
    with pytest.raises(ConfigError, match=r"metric_list: 'aggregaton' would go to the metric; did you mean 'aggreg"):
        check(task(tmp_path, "key", questions(3), metric_list=[{"metric": "acc", "aggregaton": "mean"}]))
    for metrics, told in (
        (["bleu"], "no bleu of the answers .* multiple_choice, only nothing"),
        (["acc", "perplexity", "bits_per_byte"], "no perplexity and no bits_per_byte of .* multiple_choice, only acc"),
    ):
        with pytest.raises(ConfigError, match=f"metric_list: lm-eval makes {told}"):
            check(task(tmp_path, "kind", questions(3), metric_list=[{"metric": metric} for metric in metrics]))
    typo = {"metric": "acc_nrom", "aggregation": "mean", "higher_is_better": True}
    included = task(tmp_path, "included", questions(3), metric_list=[{"metric": "acc"}, typo])
    (tmp_path / "outer.yaml").write_text(f"include: {included.name}\ntask: outer\n")
    with pytest.raises(ConfigError, match="outer: metric_list: lm-eval makes no acc_nrom"):
        check(tmp_path / "outer.yaml")
    (note,) = check(task(tmp_path, "median", questions(3), metric_list=[{"metric": "acc", "aggregation": "median"}]))
    assert note == "median: acc is aggregated by median, not as usual"
    (tmp_path / "list.yaml").write_text("task: list\ntask_list: [{task: one}, {task: two}]\n")
    with pytest.raises(ConfigError, match=r"list.yaml: task_list: lm-eval reads none of a file"):
        check(tmp_path / "list.yaml")
    (note,) = check(task(tmp_path, "same", questions(3), doc_to_text="Is it?"))
    assert note == "same: every question has the same text, 'Is it?'"


def test_a_number_that_lm_eval_makes_of_a_text_is_told(tmp_path):
    rows = [{"q": f"{n} + 1?", "choices": ["1", "2", "0"], "label": "1"} for n in range(2)]
    (note,) = check(task(tmp_path, "digits", rows, doc_to_target="{{label}}"))
    assert "document 0: lm-eval takes the right answer 1 as a choice's number, that of '2'" in note
    assert "write doc_to_target: label, without braces" in note
    assert check(task(tmp_path, "column", rows)) == []
    assert check(task(tmp_path, "number", [{**row, "label": 1} for row in rows], doc_to_target="{{label}}")) == []


def test_why_data_cannot_be_read(tmp_path):
    for settings, message in (
        ({"test_split": "tset"}, r"test_split: expected one of the data's splits, test; got 'tset'"),
        (
            {"test_split": None},
            "expected test_split or validation_split, whose questions are asked; .* splits are test",
        ),
    ):
        with pytest.raises(DataError, match=message):
            check(task(tmp_path, "bad", questions(3), **settings))
    file = task(tmp_path, "broken", questions(3))
    (tmp_path / "broken.jsonl").write_text('{"q": "a" "b"}\n')
    with pytest.raises(DataError, match=r"DatasetGenerationError: .* \(\w+: .*from the working directory on"):
        check(file)
    (tmp_path / "broken.jsonl").write_text("")
    with pytest.raises(DataError, match="broken"):
        check(file)


def test_equal_choices_are_told(tmp_path):
    rows = questions(3)
    rows[1]["choices"][2] = rows[1]["choices"][0]
    (note,) = check(task(tmp_path, "twice", rows))
    assert note == f"twice: document 1: the choice {rows[1]['choices'][0]!r} stands twice"


def test_a_question_among_its_own_examples_is_told(tmp_path):
    samples = {"sampler": "first_n", "samples": questions(4)}
    for name, settings in (
        ("own", {}),
        ("train", {"training_split": "test"}),
        ("twin", {"test_split": None, "validation_split": "test", "fewshot_split": "test"}),
        ("given", {"fewshot_config": samples}),
    ):
        (note,) = check(task(tmp_path, name, questions(4), **settings), shots=3)
        assert re.match(rf"{name}: [1-4] of its questions stand among their own examples, with their answers", note)
        assert check(task(tmp_path, name, questions(4), **settings)) == []
    assert check(task(tmp_path, "named", questions(4), fewshot_split="test"), shots=3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"example 0, 'Q: .*: expected a right answer, its number from 0 to 2 .*; got -1"),
        ({"label": None}, "example 0, 'Q: .*: expected a right answer; it has none"),
        ({"choices": ["a", " ", "c"]}, "example 0, 'Q: .*: expected choices that are not empty"),
    ],
)
def test_an_example_that_teaches_nothing_right_is_named(tmp_path, change, message):
    examples = [{**row, **change} for row in questions(2, seed=1)]
    file = task(tmp_path, "bad", questions(3), fewshot_config={"sampler": "first_n", "samples": examples})
    with pytest.raises(DataError, match=message):
        check(file, shots=1)
    assert check(file) == []


def test_answers_that_are_blank_and_columns_without_a_value(tmp_path):
    plain = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": {"max_gen_toks": 4}}
    rows = [{"q": "one", "label": "x"}, {"q": "two", "label": ""}]
    for name, label in (("blank", ""), ("one_of", " ")):
        with pytest.raises(DataError, match=r"document 1: expected a right answer that is not empty; got '"):
            check(task(tmp_path, name, [rows[0], {"q": "two", "label": label}], **plain))
    with pytest.raises(DataError, match=r"doc_to_target: expected a column of the data \(q, label\).*got 'lable'"):
        check(task(tmp_path, "typo", rows, **plain | {"doc_to_target": "lable"}))
    with pytest.raises(DataError, match="document 1: expected a text in q; got null"):
        check(task(tmp_path, "null", [rows[0], {"q": None, "label": "x"}], **plain | {"doc_to_text": "Q: {{q}}"}))
    with pytest.raises(DataError, match="document 1: expected a text in label; got null"):
        check(task(tmp_path, "none", [rows[0], {"q": "two", "label": None}], **plain | {"doc_to_target": "{{label}}"}))


def test_what_cannot_be_scored_is_told_before_a_model_is_read(tmp_path):
    rows, f1 = questions(3), [{"metric": "f1", "aggregation": "f1"}]
    for name, labels, metrics, message in (
        ("texts", [[row["choices"][0]] for row in rows], None, "document 0: TypeError"),
        ("mixed", [[0, 1], 1, 1], None, "document 1: TypeError"),
        ("classes", range(3), f1, "all documents: ValueError: Target is multiclass"),
    ):
        labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        file = task(tmp_path, name, labelled, metric_list=metrics)
        with pytest.raises(DataError, match=f"{name}: lm-eval cannot score the answers, {message}"):
            check(file)
    with pytest.raises(ConfigError, match="other: metric_list: lm-eval makes no perplexity of the answers"):
        check(task(tmp_path, "other", questions(2), metric_list=[{"metric": "perplexity"}]))
    (note,) = check(task(tmp_path, "alone", [{"q": "one?", "choices": ["a"], "label": 0}]))
    assert note == "alone: document 0: it has one choice only"


def test_prompts_and_their_settings(tmp_path):
    plain = {"output_type": "generate_until", "doc_to_choice": None}
    rows = [{"q": "a" * 40, "label": "x"}, {"q": "a" * 90, "label": "x"}]
    long = task(tmp_path, "long", rows, generation_kwargs={"max_gen_toks": 200, "until": ["\n"]}, **plain)
    with pytest.raises(DataError, match=r"document 1: 90 tokens and 200 new ones \(max_gen_toks\) exceed"):
        check(long)
    hot = task(tmp_path, "hot", rows, generation_kwargs={"do_sample": True, "until": []}, **plain)
    with pytest.raises(ConfigError, match="hot: generation_kwargs: do_sample: true needs a temperature above 0"):
        check(hot)
    from moka_jax.evaluation import generation

    beams = task(tmp_path, "beams", rows[:1], generation_kwargs={"num_beams": 4, "max_gen_toks": 4}, **plain)
    assert check(beams) == []
    with pytest.raises(ConfigError, match=r"beams: generation_kwargs: .*got {'num_beams': 4}; --backend torch"):
        check(beams, limits=Limits(context=256, vocabulary=320, check_generation=generation))
    settings = {"until": "\n", "do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 9}
    stops, most, sampling = generation(settings)
    assert (stops, most, sampling.temperature, sampling.top_k) == (["\n"], 9, 0.5, 3)


def test_a_foreign_tokenizer_and_too_few_examples(tmp_path):
    with pytest.raises(DataError, match=r"token 2[0-9][0-9] is none of the model's 200; is it its tokenizer"):
        check(task(tmp_path, "pick", questions(2)), limits=Limits(context=256, vocabulary=200))
    with pytest.raises(
        DataError, match=r"pick: lm-eval cannot write its questions: .*; it asks for 5 examples, and there are 2"
    ):
        check(task(tmp_path, "pick", questions(2)), shots=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "expected a task of lm-eval, a YAML mapping with a key 'task'; got list"),
        ("task: [", "expected a task of lm-eval in YAML; while parsing"),
        ("dataset_path: json\n", "a YAML mapping whose 'task' is its name; got None"),
        ("group: g\ntask: [a, b]\n", r"got \['a', 'b'\]; of a group, give the files of its tasks"),
        ("task: x\ndoc_to_chioce: 1\n", r"unknown 'doc_to_chioce' \(did you mean 'doc_to_choice'\?\)"),
        (b"\xff\xfe\x00", "expected a task of lm-eval in YAML"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, text, message):
    file = tmp_path / "task.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(MokaError, match=message) as caught:
        load_tasks([str(file)])
    assert str(file) in str(caught.value)


def test_missing_files_and_names_that_stand_twice(tmp_path):
    with pytest.raises(ConfigError, match=r"no_such.yaml: no such file"):
        load_tasks([str(tmp_path / "no_such.yaml")])
    file = task(tmp_path, "pick", questions(2))
    (tmp_path / "twin").mkdir()
    twin = task(tmp_path / "twin", "pick", questions(3))
    with pytest.raises(ConfigError, match=f"{re.escape(f'{file} and {twin}')} are both, or both hold, a task 'pick'"):
        load_tasks([str(file), str(twin)])
    (tmp_path / "pick.jsonl").unlink()
    with pytest.raises(DataError, match=r"a file of the task is missing: .*pick\.jsonl"):
        load_tasks([str(file)])


def test_an_unknown_name_is_told_the_nearest(monkeypatch):
    class Few:
        all_tasks = ("arc_easy", "arc_challenge", "boolq")
        task_index = dict.fromkeys(all_tasks)

        def __init__(self, include_defaults: bool) -> None:
            assert include_defaults

    monkeypatch.setattr(moka_cli.eval_tasks, "TaskManager", Few)
    with pytest.raises(ConfigError, match=r"lm-eval has no task 'arc_esy'; did you mean arc_easy\?"):
        load_tasks(["arc_esy"])
