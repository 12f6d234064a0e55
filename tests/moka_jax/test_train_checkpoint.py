"""Checkpoints: what comes back, what is kept, what is passed over, and what is refused by which message."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moka_core import DataError
from moka_jax import MokaParam
from moka_jax.train import (
    CheckpointError,
    OptimiserConfig,
    load_dataset,
    make_optimiser,
    restore_adapter,
    saved_run,
    start_state,
)
from moka_jax.train.batches import train_batches
from moka_jax.train.checkpoint import Checkpoints, Restored, checkpoint_steps, restore
from moka_jax.train.step import TrainState
from tests.moka_jax.train_toys import arrays, make_model, make_tokenizer, write_data

# what Orbax leaves behind after reading a damaged checkpoint
pytestmark = pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")

MEANING = {"seed": 0, "optimiser.learning_rate": 0.1, "data.max_length": 64, "base model": None}


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> None:
    """Orbax shows pages of what went wrong below it."""
    caplog.set_level(logging.CRITICAL + 1)


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = load_dataset(write_data(tmp_path_factory.mktemp("data"))[0], make_tokenizer())
    return lambda: train_batches(data, batch_size=2, accumulate=1, seed=0)


def state_of(seed: int, *, step: int = 0) -> TrainState:
    """A state whose moments and counts are not zero, as after some steps."""
    optimiser = make_optimiser(OptimiserConfig(learning_rate=0.1), steps=9)
    state = start_state(optimiser, nnx.state(make_model(seed=seed), MokaParam))
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed + 1, leaf.dtype), state.moments)
    counts = {"skipped": jnp.int32(seed + 5), "skipped_in_a_row": jnp.int32(seed + 2)}
    return dataclasses.replace(state, moments=moments, step=jnp.int32(step), **counts)


def opened(folder: Path, *, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep=keep, meaning=MEANING, config={"steps": 9})


def saved(folder: Path, batches: Any, *steps: int, best: int | None = None, keep: int = 2) -> TrainState:
    """A folder with checkpoints of these steps; the state of the last."""
    with opened(folder, keep=keep) as checkpoints:
        for step in steps:
            batches.set_state({"next_index": step})
            state = state_of(step, step=step)
            checkpoints.save(state, batches, best=best)
    return state


def restored_from(folder: Path, batches: Any, **changes: Any) -> Restored:
    restored = restore(folder, state_of(1), batches, meaning=MEANING | changes)
    assert restored is not None
    return restored


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, batches_of: Any) -> None:
    state = saved(tmp_path / "c", batches_of(), 3)
    batches = batches_of()
    restored = restored_from(tmp_path / "c", batches)
    assert restored.damaged == {}
    assert batches.get_state() == {"next_index": 3}
    counts = [int(count) for count in (restored.state.step, restored.state.skipped, restored.state.skipped_in_a_row)]
    assert counts == [3, 8, 5]
    expected, got = arrays(state), arrays(restored.state)
    assert len(expected) == len(got) > 10
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_only_the_newest_stay_and_no_base_is_saved(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 1, 2, 3)
    assert checkpoint_steps(tmp_path / "c") == [2, 3]
    parts = {path.name for path in (tmp_path / "c" / "3").iterdir() if path.is_dir()}
    assert parts == {"adapter", "moments", "data"}
    keys = json.loads((tmp_path / "c" / "3" / "adapter" / "_METADATA").read_text())["tree_metadata"]
    assert keys
    assert all("factor_" in key or "gate_logits" in key for key in keys)


def test_the_best_stays_beside_the_newest(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 1, 2, 3, 4, best=2)
    assert checkpoint_steps(tmp_path / "c") == [2, 3, 4]
    saved(tmp_path / "c", batches_of(), 5, best=4)  # opened anew; another one is the best now
    assert checkpoint_steps(tmp_path / "c") == [4, 5]
    saved(tmp_path / "c", batches_of(), 6, 7, best=4, keep=1)
    assert checkpoint_steps(tmp_path / "c") == [4, 7]


def test_a_step_is_saved_once(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    before = (tmp_path / "c" / "3" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
    with opened(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, step=3), batches_of())
    assert (tmp_path / "c" / "3" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == before


def test_a_save_that_was_cut_off_is_no_checkpoint(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    half = tmp_path / "c" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "c" / "3", half, ignore=shutil.ignore_patterns("commit_success.txt"))
    assert int(restored_from(tmp_path / "c", batches_of()).state.step) == 3
    saved(tmp_path / "c", batches_of(), 5)
    assert checkpoint_steps(tmp_path / "c") == [3, 5]
    assert not half.exists()


def test_changed_settings_are_all_listed_and_no_older_checkpoint_is_taken(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 2, 3)
    changes = {"seed": 1, "optimiser.learning_rate": 0.2, "extra": True}
    with pytest.raises(CheckpointError) as caught:
        restored_from(tmp_path / "c", batches_of(), **changes)
    message = str(caught.value)
    assert message.startswith(str((tmp_path / "c" / "3").resolve()))
    assert "this checkpoint belongs to another run; 3 settings differ" in message
    assert "\n  extra: the checkpoint has nothing, this run true\n" in message
    assert "\n  optimiser.learning_rate: the checkpoint has 0.1, this run 0.2\n" in message
    assert "\n  seed: the checkpoint has 0, this run 1\n" in message
    assert "data.max_length" not in message
    assert message.endswith("or use another output folder")
    assert checkpoint_steps(tmp_path / "c") == [2, 3]


def test_from_nothing_nothing_is_restored(tmp_path: Path, batches_of: Any) -> None:
    assert restore(tmp_path / "c", state_of(0), batches_of(), meaning=MEANING) is None
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 2, 3)
    path = tmp_path / "c" / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["format_version"] = 99
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of this program, format 2; got format 99"):
        restored_from(tmp_path / "c", batches_of())
    assert checkpoint_steps(tmp_path / "c") == [2, 3]


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def describe_otherwise(folder: Path, **changes: Any) -> None:
    path = folder / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"] = {k: v for k, v in (content["custom_metadata"] | changes).items() if v is not None}
    path.write_text(json.dumps(content))


NOT_SAVED = "its contents are not those that were saved"
DAMAGES: dict[str, tuple[Any, str]] = {
    "an array with a flipped bit": (lambda folder: flip(biggest(folder / "adapter" / "d")), ""),
    "a moment with a flipped bit": (lambda folder: flip(biggest(folder / "moments" / "d")), ""),
    "an array file that is cut off": (lambda folder: cut(biggest(folder / "adapter" / "d")), ""),
    "a missing array file": (lambda folder: shutil.rmtree(folder / "adapter" / "d"), ""),
    "no adapter": (lambda folder: shutil.rmtree(folder / "adapter"), ""),
    "another position in the data": (
        lambda folder: (folder / "data" / "process_0-of-1.json").write_text('{"next_index": 2}'),
        NOT_SAVED,
    ),
    "a position that is cut off": (lambda folder: cut(folder / "data" / "process_0-of-1.json"), ""),
    "another count of skipped steps": (lambda folder: describe_otherwise(folder, skipped=1), NOT_SAVED),
    "an incomplete description": (lambda folder: describe_otherwise(folder, digest=None), "has no digest"),
    "an empty description": (
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{}"),
        "its description is missing or cut off",
    ),
    "a description that is cut off": (lambda folder: cut(folder / "_CHECKPOINT_METADATA"), ""),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    tmp_path: Path, batches_of: Any, damage: str
) -> None:
    folder = tmp_path / "c"
    saved(folder, batches_of(), 2, 3)
    expected = arrays(restored_from_copy(folder, tmp_path / "older", batches_of()))
    inflict, why = DAMAGES[damage]
    inflict(folder / "3")
    batches = batches_of()
    restored = restored_from(folder, batches)
    assert list(restored.damaged) == [3]
    assert why in restored.damaged[3]
    assert "\n" not in restored.damaged[3]
    assert 0 < len(restored.damaged[3]) <= 300
    assert batches.get_state() == {"next_index": 2}
    assert all(np.array_equal(a, b) for a, b in zip(expected, arrays(restored.state), strict=True))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.damaged"]
    saved(folder, batches_of(), 3)  # the step can be saved anew, and damaged anew
    assert int(restored_from(folder, batches_of()).state.step) == 3
    inflict(folder / "3")
    assert list(restored_from(folder, batches_of()).damaged) == [3]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.damaged", "3.damaged-1"]


def restored_from_copy(folder: Path, copy: Path, batches: Any) -> TrainState:
    """The state of step 2 alone."""
    shutil.copytree(folder / "2", copy / "2")
    return restored_from(copy, batches).state


def test_an_older_checkpoint_with_a_damaged_description_is_set_aside_too(tmp_path: Path, batches_of: Any) -> None:
    """Orbax would refuse to save, since it reads all descriptions first."""
    saved(tmp_path / "c", batches_of(), 2, 3)
    (tmp_path / "c" / "2" / "_CHECKPOINT_METADATA").write_text('{"custom')
    restored = restored_from(tmp_path / "c", batches_of())
    assert (int(restored.state.step), list(restored.damaged)) == (3, [2])
    saved(tmp_path / "c", batches_of(), 4)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2.damaged", "3", "4"]


def test_if_none_is_sound_each_is_listed_and_left_alone(tmp_path: Path, batches_of: Any) -> None:
    folder = tmp_path / "c"
    saved(folder, batches_of(), 2, 3)
    (folder / "2" / "_CHECKPOINT_METADATA").write_text("{}")
    describe_otherwise(folder / "3", skipped=1)
    before = sorted(str(path) for path in folder.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        restored_from(folder, batches_of())
    assert str(caught.value) == (
        f"{folder.resolve()}: expected a sound checkpoint; all 2 are damaged:\n"
        "  3: its contents are not those that were saved\n"
        "  2: its description is missing or cut off\n"
        "nothing was deleted; delete this folder to start again from the beginning, or use another output folder"
    )
    assert sorted(str(path) for path in folder.rglob("*")) == before


def test_a_base_in_another_precision_resumes_and_a_fine_tuned_one_does_not(tmp_path: Path, batches_of: Any) -> None:
    digits = "0123456789abcdef" * 4
    trained_on = f"{'0' * 64}.q_proj:{digits}"
    folder, batches = tmp_path / "c", batches_of()
    with Checkpoints(folder, keep=9, meaning={**MEANING, "base model": trained_on}, config={}) as checkpoints:
        checkpoints.save(state_of(1, step=1), batches)
    rounded, tuned = f"{'0' * 64}.q_proj:{digits.replace('3', '4')}", f"{'0' * 64}.q_proj:{'7' * 64}"
    assert restored_from(folder, batches_of(), **{"base model": rounded}).state.step == 1
    told = "belongs to another run; another base model: the .* but other linear weights: q_proj in 60 of 64 samples"
    with pytest.raises(CheckpointError, match=told):
        restored_from(folder, batches_of(), **{"base model": tuned})
    with pytest.raises(
        CheckpointError, match="linear weights: q_proj in 60 of 64 samples; 1 setting differs:\n  seed: the"
    ):
        restored_from(folder, batches_of(), **{"base model": tuned, "seed": 9})


def test_an_older_checkpoint_of_another_run_is_not_taken(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 2, 3)
    cut(tmp_path / "c" / "3" / "_CHECKPOINT_METADATA")
    with pytest.raises(CheckpointError, match=r"2: this checkpoint belongs to another run; 1 setting differs:"):
        restored_from(tmp_path / "c", batches_of(), seed=1)
    assert checkpoint_steps(tmp_path / "c") == [2, 3]


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    (tmp_path / "c" / "3").rename(tmp_path / "c" / "4")
    with pytest.raises(CheckpointError, match=r"all 1 are damaged:\n  4: its contents are not those that were saved"):
        restored_from(tmp_path / "c", batches_of())


def test_a_full_disk_says_which_step_is_safe(tmp_path: Path, batches_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "c"
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    for steps, way_on in (
        ((), "there is no checkpoint yet: make room on the disk, and start again from the beginning"),
        ((2, 3), "the checkpoint of step 3 is safe: make room on the disk, and start again to go on from there"),
    ):
        if steps:
            saved(folder, batches_of(), *steps)
        checkpoints = opened(folder)
        monkeypatch.setattr(checkpoints._orbax, "save_checkpointables", fail)
        with pytest.raises(CheckpointError) as caught, checkpoints:
            checkpoints.save(state_of(5, step=5), batches_of())
        assert str(caught.value) == (
            f"{folder.resolve() / '5'}: the checkpoint cannot be written: [Errno 28] No space left on device; {way_on}"
        )
    assert int(restored_from(folder, batches_of()).state.step) == 3


def run_folder(tmp_path: Path, batches: Any, losses: dict[int, float]) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, and these held-out losses by step."""
    saved(tmp_path / "checkpoints", batches, 2, 4, 6, keep=3)
    lines = [json.dumps({"kind": "eval", "step": step, "loss": loss}) + "\n" for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5}, 4),  # that before the first step has no checkpoint
        ({2: 2.0, 4: 2.0, 6: 2.0}, 2),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 1.0}, 4),  # a crash: step 8 was never saved
    ],
)
def test_the_last_or_the_best_adapter_is_exported(
    tmp_path: Path, batches_of: Any, losses: dict[int, float], best: int
) -> None:
    run = run_folder(tmp_path, batches_of(), losses)
    assert saved_run(run) == ({"steps": 9}, None)
    assert saved_run(run, which="best") == ({"steps": 9}, None)
    for which, step in (("last", 6), ("best", best)):
        model = make_model(seed=9)
        assert restore_adapter(run, model, which=which) == step  # type: ignore[arg-type]
        expected = arrays(nnx.state(make_model(seed=step), MokaParam))
        assert all(np.array_equal(a, b) for a, b in zip(expected, arrays(nnx.state(model, MokaParam)), strict=True))


def test_an_adapter_that_cannot_be_exported_is_refused_by_name(tmp_path: Path, batches_of: Any) -> None:
    with pytest.raises(CheckpointError, match=r"expected the output folder of a training run; it has no checkpoints"):
        saved_run(tmp_path)
    run = run_folder(tmp_path, batches_of(), {0: 1.0})
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: expected a held-out loss after at least one step"):
        saved_run(run, which="best")
    with pytest.raises(CheckpointError, match=r"which: expected last or best; got 'newest'"):
        saved_run(run, which="newest")  # type: ignore[arg-type]
    (run / "metrics.jsonl").write_text('{"kind": "eval", "step": 3, "loss": 2.0}\n')
    message = (
        r"expected the checkpoint of step 3, whose held-out loss is the lowest \(2.0000\); there are 2, 4, 6; take"
    )
    with pytest.raises(CheckpointError, match=message):
        restore_adapter(run, make_model(), which="best")
    (run / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:1: expected an object"):
        saved_run(run, which="best")
    flip(biggest(run / "checkpoints" / "6" / "adapter" / "d"))
    message = (
        r"6: damaged checkpoint: .+; the run has checkpoints of step 2, 4, too; "
        r"started again, the run goes on from the newest sound one"
    )
    with pytest.raises(CheckpointError, match=message):
        restore_adapter(run, make_model())
    cut(run / "checkpoints" / "6" / "_CHECKPOINT_METADATA")
    for call in (lambda: saved_run(run), lambda: restore_adapter(run, make_model())):
        with pytest.raises(CheckpointError, match=message):
            call()


def test_an_adapter_whose_bits_changed_is_not_exported(tmp_path: Path, batches_of: Any) -> None:
    run = run_folder(tmp_path, batches_of(), {})
    describe_otherwise(run / "checkpoints" / "6", adapter_digest="0" * 64)
    shutil.rmtree(run / "checkpoints" / "2")
    shutil.rmtree(run / "checkpoints" / "4")
    with pytest.raises(CheckpointError, match=r"the adapter is not the one that was saved; the run has no other"):
        restore_adapter(run, make_model())
