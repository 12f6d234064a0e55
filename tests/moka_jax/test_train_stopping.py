"""When a run ends by itself: early stopping, the best checkpoint, steps that are skipped, and all of it resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from moka_core import DataError
from moka_jax import MokaParam
from moka_jax.train import TrainingError, load_dataset, read_metrics, restore_adapter
from moka_jax.train.batches import train_batches
from moka_jax.train.checkpoint import checkpoint_steps
from moka_jax.train.stopping import best_evaluation, evaluations_without_gain
from tests.moka_jax.train_toys import (
    Ended,
    PackableModel,
    ToyModel,
    arrays,
    assert_same_end,
    make_model,
    make_tokenizer,
    poison,
    run,
    write_poisoned_data,
)


@pytest.mark.parametrize(
    ("losses", "min_delta", "without", "best"),
    [
        ([], 0.0, 0, None),
        ([3.0], 0.0, 0, None),
        ([3.0, 2.0, 1.0], 0.0, 0, 2),
        ([3.0, 3.0, 3.0], 0.0, 2, 1),  # no gain is a gain of more than min_delta
        ([1.0, 3.0, 2.0], 0.0, 2, 2),  # worse than before the first step, which has no checkpoint
        ([3.0, 1.0, 2.0, 1.5], 0.0, 2, 1),
        ([3.0, 2.6, 2.2, 2.1], 0.5, 1, 3),  # many small gains are one, once they make up min_delta
        ([3.0, 2.9, 2.8, 2.7], 0.5, 3, 3),
    ],
)
def test_what_the_held_out_losses_say(losses: list[float], min_delta: float, without: int, best: int | None) -> None:
    records: list[dict[str, Any]] = [{"kind": "eval", "step": step, "loss": loss} for step, loss in enumerate(losses)]
    mixed = [{"kind": "train", "step": 0, "loss": 0.0}, *records, {"kind": "skip", "step": 9}]
    assert evaluations_without_gain(mixed, min_delta=min_delta) == without
    found = best_evaluation(mixed)
    assert (None if found is None else found["step"]) == best


IMPATIENT: dict[str, Any] = {"eval_every": 1, "early_stopping": {"patience": 2, "min_delta": 1.0}}


def test_a_run_without_gains_stops_early_and_goes_on_with_more_patience(tmp_path: Path) -> None:
    result, model, printed = run(tmp_path, **IMPATIENT)
    assert (result.step, result.stopped_early, result.interrupted) == (2, True, False)
    assert [r["step"] for r in read_metrics(result.metrics) if r["kind"] == "eval"] == [0, 1, 2]
    assert result.best_step == 2
    said = "stopped early after step 2: no gain of more than 1.0 in 2 evaluations; the lowest held-out loss, "
    assert f"{said}{result.eval_loss:.4f}, " in printed
    assert checkpoint_steps(result.checkpoints) == [1, 2]
    again = run(tmp_path, **IMPATIENT)  # it has ended: nothing is left to do, and nothing changes
    assert (again[0].step, again[0].resumed_from, again[0].stopped_early) == (2, 2, True)
    assert_same_end((result, model, printed), again)
    patient = IMPATIENT | {"early_stopping": {"patience": 4, "min_delta": 1.0}}
    longer = run(tmp_path, **patient)
    assert (longer[0].resumed_from, longer[0].step) == (2, 4)
    assert_same_end(longer, run(tmp_path / "straight", **patient))


def test_without_the_losses_up_to_the_checkpoint_a_run_does_not_go_on(tmp_path: Path) -> None:
    """It would take a later checkpoint for the best one, and delete that."""
    result, _, _ = run(tmp_path, **IMPATIENT)
    result.metrics.unlink()
    message = r"metrics.jsonl: expected the held-out losses up to step 2, which say what the best checkpoint is"
    for changes in (IMPATIENT, IMPATIENT | {"early_stopping": None}):
        with pytest.raises(DataError, match=message):
            run(tmp_path, **changes)
    assert checkpoint_steps(result.checkpoints) == [1, 2]


def test_the_best_checkpoint_is_kept_though_the_run_goes_on(tmp_path: Path) -> None:
    """A rate this large drives the held-out loss up again after a while."""
    seen: dict[int, list[np.ndarray]] = {}

    def look(step: int, adapter: nnx.State, _: Any) -> None:
        seen[step] = arrays(adapter)

    optimiser = {"learning_rate": 1.0, "warmup_steps": 0, "schedule": "constant"}
    changes: dict[str, Any] = {"eval_every": 1, "checkpoint_every": 50, "keep_checkpoints": 1, "optimiser": optimiser}
    result, _, _ = run(tmp_path, look, **changes)
    held = {r["step"]: r["loss"] for r in read_metrics(result.metrics) if r["kind"] == "eval" and r["step"] > 0}
    best = min(held, key=lambda step: held[step])
    assert best < 6  # else the test would show nothing
    assert result.best_step == best
    assert checkpoint_steps(result.checkpoints) == [best, 7]
    for which, step in (("best", best), ("last", 7)):
        model = make_model(seed=5)
        assert restore_adapter(tmp_path / "run", model, which=which) == step  # type: ignore[arg-type]
        pairs = zip(seen[step], arrays(nnx.state(model, MokaParam)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def poisoned_steps(path: str, *, pack_to: int | None = None) -> list[int]:
    """The first steps, counted from 1, whose batches hold the example that makes the loss NaN."""
    data = load_dataset(path, make_tokenizer(), max_length=96)
    batches = train_batches(data, batch_size=3, accumulate=2, seed=0, pack_to=pack_to)
    bad = make_tokenizer().convert_tokens_to_ids("~")
    return [step for step in range(1, 8) if (next(batches)["tokens"] == bad).any()]


def test_skipped_steps_are_recorded_and_shown(tmp_path: Path) -> None:
    path = write_poisoned_data(tmp_path)
    bad = poisoned_steps(path)
    assert 1 < len(bad) < 6
    seen: dict[int, list[np.ndarray]] = {}
    result, _, printed = run(
        tmp_path,
        lambda step, adapter, _: seen.update({step: arrays(adapter)}),
        model=poison(make_model()),
        data={"train": path},
    )
    records = read_metrics(result.metrics)
    skips = [record for record in records if record["kind"] == "skip"]
    assert [record["step"] for record in skips] == bad
    assert [record["skipped"] for record in skips] == list(range(1, len(bad) + 1))
    assert {record["reason"] for record in skips} == {"loss is nan"}
    assert [r["step"] for r in records if r["kind"] == "train"] == [step for step in range(1, 8) if step not in bad]
    assert result.skipped == len(bad)
    assert f"step {bad[0]}/7  skipped: loss is nan (1 in a row, 1 in all)" in printed
    assert "1 skipped" in printed
    for step in range(2, 8):
        same = all(np.array_equal(a, b) for a, b in zip(seen[step - 1], seen[step], strict=True))
        assert same == (step in bad)


@pytest.mark.parametrize("log_every", [1, 5])
def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, log_every: int) -> None:
    """With rare records it is noticed late, and nothing has moved in the meantime: the same step is named."""
    model = make_model()
    model.head.kernel[...] = model.head.kernel[...] * np.nan
    changes: dict[str, Any] = {"data": {"eval": None}, "log_every": log_every, "checkpoint_every": 5}
    message = (
        r"step 3: loss is nan; 3 steps in a row changed nothing \(max_skipped_steps: 2\); lower "
        r"optimiser.learning_rate, lengthen optimiser.warmup_steps, or look at the data; there is no checkpoint yet"
    )
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, model=model, max_skipped_steps=2, **changes)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == []
    skips = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "skip"]
    assert [record["skipped_in_a_row"] for record in skips] == ([1, 2, 3] if log_every == 1 else [5])


def test_no_skipped_step_is_allowed_with_a_limit_of_zero(tmp_path: Path) -> None:
    path = write_poisoned_data(tmp_path)
    first = poisoned_steps(path)[0]
    changes: dict[str, Any] = {"data": {"train": path, "eval": None}, "max_skipped_steps": 0, "checkpoint_every": 1}
    saved = rf"the newest checkpoint is of step {first - 1}" if first > 1 else "there is no checkpoint yet"
    with pytest.raises(TrainingError, match=rf"step {first}: loss is nan; 1 step in a row changed nothing .*; {saved}"):
        run(tmp_path, model=poison(make_model()), **changes)


def test_the_count_of_skipped_steps_survives_a_stop(tmp_path: Path) -> None:
    """The limit is passed by steps of both parts of the run together."""
    model = make_model()
    model.head.kernel[...] = model.head.kernel[...] * np.nan

    def press(step: int, *_: Any) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    changes: dict[str, Any] = {"data": {"eval": None}, "max_skipped_steps": 3}
    assert run(tmp_path, press, model=model, **changes)[0].skipped == 2
    with pytest.raises(TrainingError, match=r"step 4: .* 4 steps in a row .*; the newest checkpoint is of step 2"):
        run(tmp_path, model=model, **changes)


def fragile(seed: int = 0) -> ToyModel:
    return poison(make_model(kind=PackableModel, seed=seed))


def everything(folder: Path) -> dict[str, Any]:
    """Packing, a step that is skipped, and early stopping after step 6 of 9."""
    return {
        "data": {"train": write_poisoned_data(folder), "packing": True},
        "early_stopping": {"patience": 3, "min_delta": 1.0},
        "eval_every": 2,
        "steps": 9,
        "checkpoint_every": 4,
        "batch_size": 2,
        "accumulate": 1,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("whole")
    ended = run(folder, model=fragile(), **everything(folder))
    skips = [record["step"] for record in read_metrics(ended[0].metrics) if record["kind"] == "skip"]
    assert (ended[0].step, ended[0].stopped_early) == (6, True)
    assert 0 < len(skips) < 6
    assert "; packed into rows of 96" in ended[2]
    return ended


@pytest.mark.parametrize("stops", [(1,), (3,), (2, 5), (1, 2, 3, 4, 5)])
def test_stopped_and_resumed_with_everything_on_it_ends_the_same(
    tmp_path: Path, whole: Ended, stops: tuple[int, ...]
) -> None:
    """Packing in the middle of a group of rows, skipped steps and early stopping; stopped by both signals in turn."""
    changes = everything(tmp_path)

    def press(step: int, *_: Any) -> None:
        if step in stops:
            signal.raise_signal(signal.SIGTERM if step % 2 else signal.SIGINT)

    for number, stop in enumerate(stops):
        result, _, _ = run(tmp_path, press, model=fragile(seed=number), **changes)
        assert (result.step, result.interrupted, result.stopped_early) == (stop, True, False)
        position = json.loads((result.checkpoints / str(stop) / "data" / "process_0-of-1.json").read_text())
        assert position["counter"] == 2 * stop
    resumed = run(tmp_path, model=fragile(seed=9), **changes)
    assert (resumed[0].resumed_from, resumed[0].step, resumed[0].stopped_early) == (stops[-1], 6, True)
    assert_same_end(resumed, whole)


def test_crashed_and_resumed_with_everything_on_it_ends_the_same(tmp_path: Path, whole: Ended) -> None:
    class PowerCut(Exception):
        pass

    def crash(step: int, *_: Any) -> None:
        if step == 5:
            raise PowerCut

    changes = everything(tmp_path)
    with pytest.raises(PowerCut):
        run(tmp_path, crash, model=fragile(), **changes)
    resumed = run(tmp_path, model=fragile(), **changes)
    assert resumed[0].resumed_from == 4
    assert_same_end(resumed, whole)
