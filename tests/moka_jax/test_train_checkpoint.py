"""Checkpoints: what comes back, what is kept, and what is refused by which message."""

from __future__ import annotations

import dataclasses
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

from moka_jax import MokaParam
from moka_jax.train import CheckpointError, OptimiserConfig, load_dataset, make_optimiser
from moka_jax.train.checkpoint import Checkpoints
from moka_jax.train.data import train_batches
from moka_jax.train.step import TrainState
from tests.moka_jax.train_toys import arrays, make_model, make_tokenizer, write_data

MEANING = {"seed": 0, "optimiser.learning_rate": 0.1, "data.max_length": 64}


@pytest.fixture(scope="module")
def batches_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = load_dataset(write_data(tmp_path_factory.mktemp("data"))[0], make_tokenizer())
    return lambda: train_batches(data, batch_size=2, accumulate=1, seed=0)


def state_of(seed: int, *, step: int = 0) -> TrainState:
    """A state whose moments are not zero, as after some steps."""
    optimiser = make_optimiser(OptimiserConfig(learning_rate=0.1), steps=9)
    state = optimiser.start(nnx.state(make_model(seed=seed), MokaParam))
    moments = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed + 1, leaf.dtype), state.moments)
    return dataclasses.replace(state, moments=moments, step=jnp.int32(step))


def opened(folder: Path, *, keep: int = 2, **changes: Any) -> Checkpoints:
    return Checkpoints(folder, keep=keep, meaning=MEANING | changes, config={"steps": 9})


def saved(folder: Path, batches: Any, *steps: int) -> TrainState:
    """A folder with checkpoints of these steps; the state of the last."""
    with opened(folder) as checkpoints:
        for step in steps:
            batches.set_state({"next_index": step})
            state = state_of(step, step=step)
            assert checkpoints.save(state, batches) == step
    return state


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path, batches_of: Any) -> None:
    state = saved(tmp_path / "c", batches_of(), 3)
    batches = batches_of()
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        restored = checkpoints.restore(state_of(1), batches)
    assert int(restored.step) == 3
    assert batches.get_state() == {"next_index": 3}
    expected, got = arrays(state), arrays(restored)
    assert len(expected) == len(got) > 10
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


def test_only_the_newest_stay_and_no_base_is_saved(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 1, 2, 3)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]
    parts = {path.name for path in (tmp_path / "c" / "3").iterdir() if path.is_dir()}
    assert parts == {"adapter", "moments", "data"}
    keys = json.loads((tmp_path / "c" / "3" / "adapter" / "_METADATA").read_text())["tree_metadata"]
    assert keys
    assert all("factor_" in key or "gate_logits" in key for key in keys)


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
    with opened(tmp_path / "c") as checkpoints:
        assert checkpoints.latest == 3
        assert checkpoints.save(state_of(5, step=5), batches_of()) == 5
        assert checkpoints.latest == 5
    assert not half.exists()


def test_changed_settings_are_all_listed(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    changes = {"seed": 1, "optimiser.learning_rate": 0.2, "extra": True}
    with opened(tmp_path / "c", **changes) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(state_of(0), batches_of())
    message = str(caught.value)
    assert "this checkpoint belongs to another run; 3 settings differ" in message
    assert "\n  extra: the checkpoint has nothing, this run true\n" in message
    assert "\n  optimiser.learning_rate: the checkpoint has 0.1, this run 0.2\n" in message
    assert "\n  seed: the checkpoint has 0, this run 1\n" in message
    assert "data.max_length" not in message
    assert message.endswith("or use another output folder")


def test_restoring_from_nothing_is_refused(tmp_path: Path, batches_of: Any) -> None:
    with (
        opened(tmp_path / "c") as checkpoints,
        pytest.raises(CheckpointError, match=r"expected a checkpoint"),
    ):
        checkpoints.restore(state_of(0), batches_of())


def test_a_foreign_checkpoint_is_refused(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    path = tmp_path / "c" / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["format_version"] = 99
    path.write_text(json.dumps(content))
    with opened(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=r"format 1; got format 99"):
        checkpoints.restore(state_of(0), batches_of())


def biggest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "an array with a flipped bit": lambda folder: flip(biggest(folder / "adapter" / "d")),
    "a moment with a flipped bit": lambda folder: flip(biggest(folder / "moments" / "d")),
    "a missing array file": lambda folder: shutil.rmtree(folder / "adapter" / "d"),
    "no adapter": lambda folder: shutil.rmtree(folder / "adapter"),
    "another position in the data": lambda folder: (folder / "data" / "process_0-of-1.json").write_text(
        '{"next_index": 2}'
    ),
    "an empty description": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{}"),
    "a torn description": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text('{"custom'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name(
    tmp_path: Path, batches_of: Any, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    saved(tmp_path / "c", batches_of(), 2, 3)
    DAMAGES[damage](tmp_path / "c" / "3")
    expected = "expected a checkpoint of this program" if "description" in damage else "damaged checkpoint"
    with opened(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=expected) as caught:
        checkpoints.restore(state_of(0), batches_of())
    assert str(caught.value).startswith(str((tmp_path / "c" / "3").resolve()))
    if "damaged" in expected:
        assert "delete this folder to resume from step 2" in str(caught.value)


def test_a_renamed_checkpoint_is_refused(tmp_path: Path, batches_of: Any) -> None:
    saved(tmp_path / "c", batches_of(), 3)
    (tmp_path / "c" / "3").rename(tmp_path / "c" / "4")
    message = "its contents are not those that were saved"
    with opened(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=message) as caught:
        checkpoints.restore(state_of(0), batches_of())
    assert "delete this folder to start again" in str(caught.value)
