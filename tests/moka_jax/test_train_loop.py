"""The loop: what a run leaves behind, and that stopping, crashing and resuming change no bit of it."""

from __future__ import annotations

import importlib
import io
import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from moka_core import ConfigError, DataError, MokaConfig
from moka_core.oracle import term_gates
from moka_jax import MokaParam, export_adapter
from moka_jax.sharding import Layout, make_mesh
from moka_jax.train import (
    CheckpointError,
    TrainingError,
    TrainResult,
    load_dataset,
    make_eval_step,
    plot_losses,
    read_metrics,
    train,
)
from moka_jax.train.batches import eval_batches
from moka_jax.train.interrupt import Interrupt
from moka_jax.train.metrics import MetricsLog
from moka_jax.train.processes import only_run_in
from tests.moka_jax.train_toys import (
    ToyModel,
    arrays,
    assert_same_end,
    make_config,
    make_model,
    make_tokenizer,
    run,
    write_lines,
)

LOOP = importlib.import_module("moka_jax.train.loop")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, ToyModel, str]:
    """A run that was never stopped."""
    return run(tmp_path_factory.mktemp("whole"))


def test_a_run_writes_every_record_once_and_learns(whole: tuple[TrainResult, ToyModel, str]) -> None:
    result, _, printed = whole
    records = read_metrics(result.metrics)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("start", 0),
        ("data", 0),
        ("data", 0),
        ("eval", 0),
        ("gates", 0),
        *(("train", step) for step in (1, 2, 3)),
        ("eval", 3),
        ("train", 4),
        ("gates", 4),
        *(("train", step) for step in (5, 6)),
        ("eval", 6),
        ("train", 7),
        ("eval", 7),
    ]
    held = [record["loss"] for record in records if record["kind"] == "eval"]
    assert held[-1] < held[0]
    assert (result.step, result.interrupted, result.resumed_from) == (7, False, None)
    trained = [record for record in records if record["kind"] == "train"]
    assert (result.train_loss, result.eval_loss) == (trained[-1]["loss"], held[-1])
    assert {"learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= set(trained[0])
    seconds = [record["seconds"] for record in records if record["kind"] in ("train", "eval")]
    assert seconds == sorted(seconds)
    # after steps 3 and 6, too, the held-out loss was the lowest so far
    assert sorted(path.name for path in result.checkpoints.iterdir()) == ["6", "7"]
    assert (result.best_step, result.stopped_early, result.skipped) == (7, False, 0)
    lines = printed.splitlines()  # plain lines, not wrapped at the console's 40 columns
    assert "train.jsonl: 13 examples, 201 of 581 tokens learned, longest 60, 0 cut at data.max_length 96" in lines[0]
    assert any(line.startswith("step 5/7  loss ") and "tokens/s" in line and "left 0:" in line for line in lines)
    assert lines[-1] == f"step 7/7  held-out loss {held[-1]:.4f}"


def test_the_gates_of_the_records_are_those_of_the_adapter(tmp_path: Path) -> None:
    result, model, _ = run(tmp_path, checkpoint_every=7)
    records = {r["step"]: r["gates"] for r in read_metrics(result.metrics) if r["kind"] == "gates"}
    assert records.keys() == {0, 7}
    for step, adapter in {0: export_adapter(make_model()), 7: export_adapter(model)}.items():
        assert records[step].keys() == adapter.layers.keys()
        for path, layer in adapter.layers.items():
            assert records[step][path] == pytest.approx(term_gates(layer, adapter.config), abs=1e-6)
    assert all(records[0][path] != pytest.approx(records[7][path], abs=1e-3) for path in records[0])


def test_interrupted_where_both_are_due_the_records_keep_their_order(tmp_path: Path) -> None:
    def press(step: int, *_: Any) -> None:
        if step == 3:  # its evaluation is skipped, so the gates of this step wait for it
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole", checkpoint_every=3)
    result, _, _ = run(tmp_path / "stopped", press, checkpoint_every=3)
    assert [r["step"] for r in read_metrics(result.metrics) if r["kind"] == "gates"] == [0]
    resumed = run(tmp_path / "stopped", checkpoint_every=3)
    assert_same_end(resumed, whole)
    starts = [r["step"] for r in read_metrics(resumed[0].metrics) if r["kind"] == "start"]
    assert starts == [0, 3]


def test_the_model_holds_the_adapter_that_was_evaluated_last(whole: tuple[TrainResult, ToyModel, str]) -> None:
    result, model, _ = whole
    data = load_dataset(result.metrics.parent.parent / "eval.jsonl", make_tokenizer())
    total, count = 0.0, 0
    for example in data.examples:  # one by one, without batches or padding
        scores = jax.nn.log_softmax(model(jnp.asarray(example.tokens[None, :-1]))[0])
        picked = np.asarray(scores)[np.arange(len(scores)), example.tokens[1:]]
        total -= picked[example.loss_mask[1:]].sum()
        count += example.loss_mask.sum()
    assert result.eval_loss == pytest.approx(total / count, rel=1e-5)
    fresh = make_model()
    assert all(
        not np.array_equal(a, b)
        for a, b in zip(arrays(nnx.state(fresh, MokaParam)), arrays(nnx.state(model, MokaParam)), strict=True)
    )


def test_interrupted_and_resumed_it_ends_the_same(tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]) -> None:
    def press(step: int, *_: Any) -> None:
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result, _, printed = run(tmp_path, press)
    assert (result.step, result.interrupted) == (5, True)
    assert "stopping after this step; press Ctrl-C again, or repeat the signal, to stop at once" in printed
    assert "interrupted: checkpoint of step 5 saved; start again to go on from there" in printed
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = run(tmp_path, model=make_model(seed=4))  # the checkpoint's adapter, not this one, must win
    assert resumed[0].resumed_from == 5
    assert "going on from step 5 of 7" in resumed[2]
    assert_same_end(resumed, whole)
    again = run(tmp_path, model=make_model(seed=4))  # finished: nothing is left to do, and nothing changes
    assert again[0].resumed_from == 7
    assert_same_end(again, whole)
    assert "this run ended at step 7 of 7; nothing is left to do" in again[2]
    assert "going on" not in again[2]


def test_crashed_and_resumed_it_ends_the_same(tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]) -> None:
    class PowerCut(Exception):
        pass

    def crash(step: int, *_: Any) -> None:
        if step == 6:
            raise PowerCut

    model = make_model()
    before = arrays(nnx.state(model))
    with pytest.raises(PowerCut):
        run(tmp_path, crash, model=model)
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(nnx.state(model)), strict=True))
    path = tmp_path / "run" / "metrics.jsonl"
    assert read_metrics(path)[-1]["step"] == 6
    with path.open("a") as file:
        file.write('{"kind": "tra')  # a line that the crash cut off
    resumed = run(tmp_path)
    assert resumed[0].resumed_from == 4
    assert_same_end(resumed, whole)


def test_a_keyboard_interrupt_from_the_hook_stops_cleanly_during_an_evaluation(
    tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]
) -> None:
    def press(step: int, *_: Any) -> None:
        if step == 3:  # an evaluation is due after this step: it is skipped now and made up for later
            raise KeyboardInterrupt

    result, _, _ = run(tmp_path, press)
    assert (result.step, result.interrupted) == (3, True)
    assert [r["step"] for r in read_metrics(result.metrics) if r["kind"] == "eval"] == [0]
    assert_same_end(run(tmp_path), whole)


def test_interrupted_in_its_last_evaluation_a_run_is_not_at_its_end(
    tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]
) -> None:
    def press(step: int, *_: Any) -> None:
        if step == 7:
            raise KeyboardInterrupt

    result, _, printed = run(tmp_path, press)
    assert (result.step, result.interrupted) == (7, True)
    assert "interrupted: checkpoint of step 7 saved; start again to go on from there" in " ".join(printed.split())
    assert 7 not in [r["step"] for r in read_metrics(result.metrics) if r["kind"] == "eval"]
    again = run(tmp_path)
    assert (again[0].step, again[0].interrupted) == (7, False)
    assert_same_end(again, whole)


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]) -> None:
    with only_run_in(whole[0].metrics.parent):
        before = whole[0].metrics.read_bytes()
        with pytest.raises(ConfigError, match=r"another run writes into .*; wait for its end"):
            run(whole[0].metrics.parent.parent)
        assert whole[0].metrics.read_bytes() == before
    assert run(whole[0].metrics.parent.parent)[0].resumed_from == 7


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)],
)
def test_the_second_signal_stops_at_once(first: signal.Signals, second: signal.Signals) -> None:
    asked = []
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt(lambda: asked.append(1)) as interrupt:
        signal.raise_signal(first)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert asked == [1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_of_the_main_thread_no_handler_is_set() -> None:
    seen = []

    def work() -> None:
        with Interrupt(lambda: None) as interrupt:
            seen.append(interrupt.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_the_hook_sees_every_step_and_the_adapter_of_that_step(tmp_path: Path) -> None:
    seen: list[tuple[int, list[np.ndarray], float]] = []

    def look(step: int, adapter: nnx.State, metrics: Any) -> None:
        seen.append((step, arrays(adapter), float(metrics["loss"])))

    changes = {"steps": 4, "log_every": 3, "eval_every": 50, "data": {"eval": None}}
    result, model, printed = run(tmp_path, look, **changes)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    records = [record for record in read_metrics(result.metrics) if record["kind"] == "train"]
    assert [(record["step"], record["loss"]) for record in records] == [(n, seen[n - 1][2]) for n in (3, 4)]
    assert result.eval_loss is None
    assert "held-out" not in printed
    assert all(np.array_equal(a, b) for a, b in zip(seen[-1][1], arrays(nnx.state(model, MokaParam)), strict=True))
    assert not np.array_equal(seen[0][1][0], seen[1][1][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": {"learning_rate": 0.01}}, "optimiser.learning_rate: the checkpoint has 0.02, this run 0.01"),
        ({"steps": 9}, "steps: the checkpoint has 7, this run 9"),
        ({"accumulate": 1, "batch_size": 6}, "2 settings differ"),
        ({"data": {"max_length": 40}}, "data.max_length: the checkpoint has 96, this run 40"),
    ],
)
def test_a_run_with_another_meaning_does_not_resume(
    whole: tuple[TrainResult, ToyModel, str], changes: dict[str, Any], message: str
) -> None:
    before = whole[0].metrics.read_text()
    with pytest.raises(CheckpointError, match=message):
        run(whole[0].metrics.parent.parent, **changes)
    assert whole[0].metrics.read_text() == before


def test_other_data_or_another_base_do_not_resume(tmp_path: Path, whole: tuple[TrainResult, ToyModel, str]) -> None:
    folder = whole[0].metrics.parent.parent
    other = write_lines(tmp_path / "other.jsonl", [{"text": "something else"}])
    with pytest.raises(CheckpointError, match=r'training examples: the checkpoint has "[0-9a-f]{64}", this run "'):
        run(folder, data={"train": other})
    with pytest.raises(CheckpointError, match=r"held-out examples: the checkpoint has "):
        run(folder, data={"eval": other})
    model = make_model()
    model.base_fingerprint = "f" * 64
    with pytest.raises(CheckpointError, match=r'base model: the checkpoint has null, this run "ffff'):
        run(folder, model=model)


def test_another_cadence_resumes(whole: tuple[TrainResult, ToyModel, str]) -> None:
    changes = {"eval_every": 2, "checkpoint_every": 1, "keep_checkpoints": 5, "log_every": 2}
    assert run(whole[0].metrics.parent.parent, **changes)[0].resumed_from == 7


def test_a_constant_rate_can_go_on_for_longer_but_not_back(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"optimiser": {"schedule": "constant"}, "data": {"eval": None}, "eval_every": 100}
    run(tmp_path, steps=4, **changes)
    longer = run(tmp_path, steps=6, **changes)
    assert (longer[0].resumed_from, longer[0].step) == (4, 6)
    with pytest.raises(CheckpointError, match=r"6: expected a step up to steps: 5; raise steps"):
        run(tmp_path, steps=5, **changes)
    straight = run(tmp_path / "straight", steps=6, **changes)
    assert_same_end(longer, straight)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this model has no adapter; attach one first"):
        run(tmp_path, model=ToyModel(261))


def test_what_needs_no_tokens_is_refused_before_there_are_any(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("moka_jax.train.loop.load_dataset", None)
    model = make_model()
    model.layout = Layout(make_mesh(data=2))
    with pytest.raises(ConfigError, match=r"batch_size: expected a multiple of mesh.data · mesh.fsdp, 2; got 3"):
        run(tmp_path, model=model)
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"output: expected a folder .*run; \[Errno 20\] it is a file"):
        run(tmp_path)
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    for name in ("checkpoints", "profile", "tensorboard"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(ConfigError, match=r"output: expected .*checkpoints to be a folder, .* it is a file; move it"):
        run(tmp_path)
    (tmp_path / "run" / "checkpoints").unlink()
    with pytest.raises(ConfigError, match=r"output: expected .*profile to be a folder, .* it is a file; move it"):
        run(tmp_path, profile={"start": 1, "steps": 1})
    with pytest.raises(TypeError, match="NoneType"):  # what it does not write may be as it likes
        run(tmp_path)
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"output: expected a folder for this run alone; .* holds a model"):
        run(tmp_path)


def test_devices_that_a_run_leaves_idle_are_told(whole: tuple[TrainResult, ToyModel, str]) -> None:
    assert jax.device_count() > 1
    assert f"this run uses 1 of {jax.device_count()} devices" in " ".join(whole[2].split())


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl: token [0-9]+ is beyond the model's vocabulary of 100"):
        run(tmp_path, model=make_model(vocabulary=100))


def test_a_held_out_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = make_model()
    nnx.update(model, jax.tree.map(lambda leaf: leaf * jnp.inf, nnx.state(model, MokaParam)))
    with pytest.raises(TrainingError, match=r"step 0: the held-out loss is nan; lower optimiser.learning_rate"):
        run(tmp_path, model=model)


def test_evaluation_weighs_tokens_and_not_batches(whole: tuple[TrainResult, ToyModel, str]) -> None:
    result, model, _ = whole
    data = load_dataset(result.metrics.parent.parent / "eval.jsonl", make_tokenizer())
    graphdef, adapter, frozen = nnx.split(model, MokaParam, ...)
    step = make_eval_step(graphdef)
    parts = [[float(x) for x in step(adapter, frozen, batch)] for batch in eval_batches(data, batch_size=3)]
    weighted = sum(loss for loss, _ in parts) / sum(tokens for _, tokens in parts)
    plain = sum(loss / tokens for loss, tokens in parts) / len(parts)
    assert result.eval_loss == pytest.approx(weighted, rel=1e-6)
    assert abs(weighted - plain) > 1e-5


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    config = make_config(tmp_path, steps=3, optimiser={"warmup_steps": 0})
    train(make_model(), make_tokenizer(), config, console=console)
    printed = console.file.getvalue()
    assert "3/3" in printed
    assert "tokens/s" in printed
    assert "held-out loss" in printed
    assert "step 3/3  loss" not in printed


def test_both_steps_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the base was put on its device by name, as loading does, and the new adapter was not."""
    made = []

    def kept(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: made.append(make(*arguments, **options)) or made[-1]

    monkeypatch.setattr(LOOP, "run_step", kept(LOOP.run_step))
    monkeypatch.setattr(LOOP, "make_eval_step", kept(LOOP.make_eval_step))
    model = make_model()
    nnx.update(model, jax.device_put(nnx.state(model, nnx.Not(MokaParam)), jax.devices()[0]))
    rows = write_lines(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(6)])  # of one length
    run(tmp_path, model=model, steps=3, eval_every=1, data={"train": rows, "eval": rows})
    assert [step._cache_size() for step in made] == [1, 1]


RECORDS = [{"kind": "train", "step": s, "loss": 3.0 / s} for s in (1, 2, 3)] + [
    {"kind": "eval", "step": 3, "loss": 2.0}
]


def test_metrics_of_later_steps_are_dropped_on_resuming(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resume_from=None)
    for record in RECORDS:
        log.append(record)
    assert read_metrics(path) == RECORDS
    resumed = MetricsLog(path, resume_from=2)
    assert read_metrics(path) == RECORDS[:2] == resumed.records
    assert resumed.last("train") == RECORDS[1]
    assert resumed.last("eval") is None
    assert MetricsLog(path, resume_from=None).records == []
    assert path.read_text() == ""


def test_a_number_that_is_not_finite_is_no_metric(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_from=None)
    with pytest.raises(ValueError, match=r"Out of range float"):
        log.append({"kind": "train", "step": 1, "loss": math.nan})
    assert read_metrics(log.path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "train", "step": 1}\n{oops}\n', "m.jsonl:2: not valid JSON: .*; delete that line"),
        ('{"kind": "tram", "step": 1}\n', "m.jsonl:1: expected an object with a kind of start, data, train, skip"),
        ('{"kind": "train"}\n', "m.jsonl:1: expected an object with a kind"),
        ("[1]\n", "m.jsonl:1: expected an object"),
        ('{"kind": "train", "step": 1}', "m.jsonl:1: the last line is cut off; resume the run, or delete that line"),
    ],
)
def test_a_bad_metrics_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_metrics(path)


def test_missing_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"m.jsonl: expected a metrics file that can be read"):
        read_metrics(tmp_path / "m.jsonl")


def test_losses_are_drawn(tmp_path: Path) -> None:
    plot_losses(RECORDS, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    plot_losses(RECORDS, tmp_path / "losses.svg")
    plot_losses(RECORDS[:3], tmp_path / "train.svg")
    # matplotlib draws text as shapes, but names it in comments
    assert "<!-- held out -->" in (tmp_path / "losses.svg").read_text()
    assert "<!-- held out -->" not in (tmp_path / "train.svg").read_text()
    with pytest.raises(DataError, match=r"expected at least one train or eval record; got none"):
        plot_losses([{"kind": "data", "step": 0}], tmp_path / "none.png")


def test_the_config_is_readable_in_the_checkpoint(whole: tuple[TrainResult, ToyModel, str]) -> None:
    result = whole[0]
    saved = json.loads((result.checkpoints / "7" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert saved["config"]["steps"] == 7
    assert saved["format_version"] == 2
    assert MokaConfig.from_dict({k: v for k, v in saved["config"]["adapter"].items() if k != "preset"}) == MokaConfig()
